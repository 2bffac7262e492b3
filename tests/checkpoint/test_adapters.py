"""Adapters on disk: both formats have all numbers, with the names that their programs expect."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mixtral_jax.checkpoint.formats.adapters import write_mistral, write_peft
from mixtral_jax.config import LoRAConfig
from mixtral_jax.training.assemble import make_training
from tests.cases import mesh_of, small_config

LORA = LoRAConfig(rank=3, targets="attention+experts+router")
MESHES = ({"expert": 4, "fsdp": 2}, {"expert": 2, "tensor": 2})
# The small model has 4 query heads of 12, 2 key-value heads, D=32, F=48, 8 experts and 2 layers.
HEAD_DIM = 12
PEFT = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "moe.router.gate": "block_sparse_moe.gate",
    "moe.experts.gate": "block_sparse_moe.experts.{}.w1",
    "moe.experts.down": "block_sparse_moe.experts.{}.w2",
    "moe.experts.up": "block_sparse_moe.experts.{}.w3",
}
MISTRAL = {
    "attention.query": "attention.wq",
    "attention.key": "attention.wk",
    "attention.value": "attention.wv",
    "attention.out": "attention.wo",
    "moe.router.gate": "feed_forward.gate",
    "moe.experts.gate": "feed_forward.experts.{}.w1",
    "moe.experts.down": "feed_forward.experts.{}.w2",
    "moe.experts.up": "feed_forward.experts.{}.w3",
}


@pytest.fixture(scope="module")
def model() -> Any:
    """A model in which all numbers are random, those of A and B too."""
    lora = {"rank": LORA.rank, "targets": LORA.targets}
    training = make_training(small_config(finetune__lora=lora), "cpu")
    mesh, rng = mesh_of(**MESHES[0]), np.random.default_rng(1)

    def fill(leaf: Any) -> jax.Array:
        numbers = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(numbers, jax.NamedSharding(mesh, leaf.sharding.spec))

    with jax.set_mesh(mesh):
        return jax.tree.map(fill, jax.eval_shape(training.make_model))


@pytest.fixture(scope="module")
def arrays(model: Any) -> dict[tuple[str, str], np.ndarray]:
    """The adapters by projection and half, as in ("moe.experts.gate", "lora_a")."""
    found = {}
    for name in PEFT:
        projection = model.blocks
        for part in name.split("."):
            projection = getattr(projection, part)
        for half in ("lora_a", "lora_b"):
            found[name, half] = np.asarray(getattr(projection, half).weight[...])
    return found


def expected_tensors(
    arrays: dict[tuple[str, str], np.ndarray], names: dict[str, str], layer: str
) -> dict[str, np.ndarray]:
    """The tensors by name, each transposed: [r, inputs] and [outputs, r]."""
    tensors = {}
    for (name, half), array in arrays.items():
        ending = "lora_A.weight" if half == "lora_a" else "lora_B.weight"
        for number, in_layer in enumerate(array):
            for expert, matrix in enumerate(in_layer if "experts" in name else [in_layer]):
                shape = (-1, LORA.rank) if half == "lora_a" else (LORA.rank, -1)
                tensor = f"{layer}{number}.{names[name].format(expert)}.{ending}"
                tensors[tensor] = matrix.reshape(shape).T
    return tensors


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_peft_gets_every_number_from_every_mesh(
    sizes: dict[str, int], model: Any, arrays: dict, tmp_path: Path
) -> None:
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        moved = jax.tree.map(
            lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, leaf.sharding.spec)), model
        )
        write_peft(tmp_path, moved, LORA, base="mistralai/Mixtral-8x7B-v0.1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = load_file(tmp_path / "adapter_model.safetensors")
    expected = expected_tensors(arrays, PEFT, "base_model.model.model.layers.")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_the_config_of_peft_describes_the_adapters(model: Any, tmp_path: Path) -> None:
    lora = LoRAConfig(rank=3, alpha=12.0, targets="attention+experts+router")
    with jax.set_mesh(mesh_of(**MESHES[0])):
        write_peft(tmp_path, model, lora, base="mistralai/Mixtral-8x7B-v0.1")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12.0, 0.0)
    assert config["base_model_name_or_path"] == "mistralai/Mixtral-8x7B-v0.1"
    modules = ["gate", "k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    assert sorted(config["target_modules"]) == modules
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * (4 + 1 + 3 * 8)  # A and B; layers; attention, router, experts.
    layer = "base_model.model.model.layers.1."
    assert tensors[layer + "self_attn.k_proj.lora_A.weight"].shape == (3, 32)
    assert tensors[layer + "self_attn.k_proj.lora_B.weight"].shape == (2 * 12, 3)
    assert tensors[layer + "block_sparse_moe.experts.7.w2.lora_A.weight"].shape == (3, 48)
    assert tensors[layer + "block_sparse_moe.experts.7.w2.lora_B.weight"].shape == (32, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [6.0, 12.0])
def test_mistrals_file_has_every_number_and_its_fixed_scaling_gives_ours(
    alpha: float, dtype: str, model: Any, arrays: dict, tmp_path: Path
) -> None:
    """mistral-inference adds 2 B A; rotary pairs are adjacent there."""
    lora = LoRAConfig(rank=3, alpha=alpha)
    with jax.set_mesh(mesh_of(**MESHES[0])):
        write_mistral(tmp_path, model, lora, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    expected = expected_tensors(arrays, MISTRAL, "layers.")
    for name, tensor in expected.items():
        if name.endswith("lora_B.weight"):
            tensor = tensor * np.float32(lora.scaling / 2)
            if name.split(".")[3] in ("wq", "wk"):
                heads = tensor.reshape(-1, 2, HEAD_DIM // 2, LORA.rank)
                tensor = heads.swapaxes(1, 2).reshape(-1, LORA.rank)
        expected[name] = tensor
    found = load_file(tmp_path / "lora.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], tensor.astype(found[name].dtype), err_msg=name)


def test_mistrals_file_merges_into_mistrals_weights(
    model: Any, arrays: dict, tmp_path: Path
) -> None:
    """2 B A is our scaling * A B in the layout of Mistral's weights."""
    lora = LoRAConfig(rank=3, alpha=12.0)
    with jax.set_mesh(mesh_of(**MESHES[0])):
        write_mistral(tmp_path, model, lora, dtype="float32")
    tensors = load_file(tmp_path / "lora.safetensors")

    def theirs(name: str) -> np.ndarray:
        a, b = (tensors[f"layers.1.{name}.lora_{half}.weight"] for half in "AB")
        return 2 * b @ a

    def ours(name: str, equation: str) -> np.ndarray:
        a, b = (arrays[name, half][1] for half in ("lora_a", "lora_b"))
        return lora.scaling * np.einsum(equation, a, b)

    query_DNH = ours("attention.query", "Dr,rNH->DNH")
    paired = query_DNH.reshape(32, 4, 2, 6).swapaxes(-1, -2).reshape(32, 48)
    np.testing.assert_allclose(theirs("attention.wq"), paired.T, atol=1e-4)
    value_DKH = ours("attention.value", "Dr,rKH->DKH")
    np.testing.assert_allclose(theirs("attention.wv"), value_DKH.reshape(32, 24).T, atol=1e-4)
    down_EFD = ours("moe.experts.down", "EFr,ErD->EFD")
    np.testing.assert_allclose(theirs("feed_forward.experts.5.w2"), down_EFD[5].T, atol=1e-4)
