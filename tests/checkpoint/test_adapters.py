"""Adapters on disk: both layouts give back every bit, hold what their programs expect, and refuse
what does not fit.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint.formats.adapters import (
    read_adapters,
    read_peft_config,
    write_mistral,
    write_peft,
)
from mixtral_jax.config import ConfigError, LoRAConfig, build
from mixtral_jax.finetune.surgery import merge_adapters
from mixtral_jax.training.assemble import make_training
from tests.cases import mesh_of, small_config

LORA = LoRAConfig(rank=3, targets="attention+experts+router")
SIZES = {"expert": 4, "fsdp": 2}


def adapted(lora: LoRAConfig = LORA, seed: int | None = None) -> Any:
    """A model with adapters that do something; without a seed its shapes."""
    tunable = make_training(
        small_config(finetune__lora={"rank": lora.rank, "targets": lora.targets}), "cpu"
    )
    if seed is None:
        return jax.eval_shape(tunable.make_model)

    @jax.jit
    def make() -> Any:
        graphdef, adapters, rest = nnx.split(tunable.make_model(), nnx.LoRAParam, ...)
        leaves, structure = jax.tree.flatten(adapters)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [
            jax.random.normal(key, leaf.shape, out_sharding=jax.typeof(leaf).sharding.spec)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return nnx.merge(graphdef, jax.tree.unflatten(structure, drawn), rest)

    return make()


@pytest.fixture(scope="module")
def model() -> Any:
    with jax.set_mesh(mesh_of(**SIZES)):
        return adapted(seed=1)


def adapters_of(model: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]


@pytest.mark.parametrize("program", ["peft", "mistral"])
def test_what_is_written_is_read_to_the_bit_on_another_mesh(
    model: Any, program: str, tmp_path: Path
) -> None:
    with jax.set_mesh(mesh_of(**SIZES)):
        if program == "peft":
            write_peft(tmp_path, model, LORA, base="mistralai/Mixtral-8x7B-v0.1")
        else:
            write_mistral(tmp_path, model, LORA, dtype="float32")
    assert not list(tmp_path.glob("*.partial"))
    with jax.set_mesh(mesh_of(expert=2, tensor=2)):
        shapes = adapted()
        read = read_adapters(tmp_path, shapes, LORA)
    for got, expected in zip(adapters_of(read), adapters_of(model), strict=True):
        np.testing.assert_array_equal(got, expected)
    wanted = jax.tree.leaves(nnx.state(shapes, nnx.LoRAParam))
    for got, leaf in zip(jax.tree.leaves(nnx.state(read, nnx.LoRAParam)), wanted, strict=True):
        assert got.sharding.spec == leaf.sharding.spec


def test_a_peft_folder_says_what_it_holds(model: Any, tmp_path: Path) -> None:
    lora = LoRAConfig(rank=3, alpha=12.0, targets="attention+experts+router")
    with jax.set_mesh(mesh_of(**SIZES)):
        write_peft(tmp_path, model, lora, base="mistralai/Mixtral-8x7B-v0.1")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12.0, 0.0)
    assert config["base_model_name_or_path"] == "mistralai/Mixtral-8x7B-v0.1"
    assert sorted(config["target_modules"]) == [
        "gate",
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
        "w1",
        "w2",
        "w3",
    ]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * (4 + 1 + 3 * 8)  # A and B; layers; attention, router, experts.
    layer = "base_model.model.model.layers.1."
    assert tensors[layer + "self_attn.k_proj.lora_A.weight"].shape == (3, 32)
    assert tensors[layer + "self_attn.k_proj.lora_B.weight"].shape == (2 * 12, 3)
    assert tensors[layer + "block_sparse_moe.experts.7.w2.lora_A.weight"].shape == (3, 48)
    assert tensors[layer + "block_sparse_moe.experts.7.w2.lora_B.weight"].shape == (32, 3)
    read = read_peft_config(tmp_path)
    assert (read.rank, read.alpha) == (3, 12.0)
    assert {part.rpartition(".")[0] for part in read.targets.split(",")} == {
        "attention",
        "moe.router",
        "moe.experts",
    }


def test_the_native_file_merges_into_native_weights_at_its_fixed_scaling(
    model: Any, tmp_path: Path
) -> None:
    """W + 2 B A is our merged weight in Mistral's layout, where rotary pairs lie side by side."""
    lora = LoRAConfig(
        rank=3, alpha=12.0
    )  # Scaling 4: the model was made with 2, so B counts twice.
    with jax.set_mesh(mesh_of(**SIZES)):
        write_mistral(tmp_path, model, lora, dtype="float32")
        merged: Any = jax.jit(merge_adapters)(model)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert all("lora" in name for name in tensors)

    def delta(name: str) -> np.ndarray:
        return tensors[f"layers.1.{name}.lora_B.weight"] @ tensors[f"layers.1.{name}.lora_A.weight"]

    def ours(path: Any, base: Any) -> np.ndarray:
        return np.asarray(path.weight[...] - base.weight[...])[1]

    attention, old = merged.blocks.attention, model.blocks.attention
    query_DNH = ours(attention.query, old.query.base)
    paired = query_DNH.reshape(32, 4, 2, 6).swapaxes(-1, -2).reshape(32, 48)
    np.testing.assert_allclose(delta("attention.wq"), paired.T, atol=1e-4)
    value_DKH = ours(attention.value, old.value.base)
    np.testing.assert_allclose(delta("attention.wv"), value_DKH.reshape(32, 24).T, atol=1e-4)
    down_EFD = ours(merged.blocks.moe.experts.down, model.blocks.moe.experts.down.base)
    np.testing.assert_allclose(delta("feed_forward.experts.5.w2"), down_EFD[5].T, atol=1e-4)


def test_all_native_tensors_have_the_dtype_that_is_asked_for(model: Any, tmp_path: Path) -> None:
    with jax.set_mesh(mesh_of(**SIZES)):
        write_mistral(tmp_path, model, LORA, dtype="bfloat16")
        assert {
            str(tensor.dtype) for tensor in load_file(tmp_path / "lora.safetensors").values()
        } == {"bfloat16"}
        read = read_adapters(tmp_path, adapted(), LORA)
    for got, expected in zip(adapters_of(read), adapters_of(model), strict=True):
        np.testing.assert_array_equal(got, expected.astype("bfloat16").astype(np.float32))


def test_a_file_that_does_not_fit_is_refused_with_every_reason(model: Any, tmp_path: Path) -> None:
    with jax.set_mesh(mesh_of(**SIZES)):
        write_mistral(tmp_path, model, LORA, dtype="float32")
        tensors = load_file(path := tmp_path / "lora.safetensors")
        del tensors["layers.0.attention.wq.lora_A.weight"]
        tensors["layers.0.attention.bias"] = np.zeros(3, np.float32)
        tensors["layers.1.attention.wo.lora_B.weight"] = np.zeros((32, 4), np.float32)
        save_file(tensors, path)
        with pytest.raises(ConfigError) as error:
            read_adapters(tmp_path, adapted(), LORA)
        for words in (
            "wq.lora_A.weight is missing",
            "attention.bias is unexpected",
            "has shape (32, 4), not (32, 3)",
        ):
            assert words in str(error.value)
        path.write_bytes(b"nonsense")
        with pytest.raises(ConfigError, match="cannot be read as safetensors"):
            read_adapters(tmp_path, adapted(), LORA)
        path.unlink()
        with pytest.raises(ConfigError, match=r"adapter_model\.safetensors and lora\.safetensors"):
            read_adapters(tmp_path, adapted(), LORA)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"target_modules": ["lm_head"]}, "target_modules=\\['lm_head'\\]"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear', not a list of q_proj"),
        ({"rank_pattern": {"w1": 8}}, "rank_pattern"),
        ({"r": "many"}, "finetune.lora.rank='many'"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "w2"]}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config))
    expected = build(
        LoRAConfig, {"rank": 8, "alpha": 16, "targets": "attention.query,moe.experts.down"}
    )
    assert read_peft_config(tmp_path) == expected
    path.write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=words):
        read_peft_config(tmp_path)
