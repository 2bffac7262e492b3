"""Reading a Hugging Face folder: what is accepted, what is refused, and where the weights go."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint.huggingface import LAYOUTS, load_weights, read_config
from mixtral_jax.config import Config, ConfigError, TrainConfig
from mixtral_jax.model.transformer import Transformer, model_maker
from tests.cases import mesh_of

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden folder, to be spoiled."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path


def rewrite_config(folder: Path, without: tuple[str, ...] = (), **changes: object) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config))


def shapes_of(folder: Path) -> Transformer:
    theirs = read_config(folder)
    train = TrainConfig(num_steps=1, batch_size=8, sequence_length=8)
    return jax.eval_shape(model_maker(Config(model=theirs.model, router=theirs.router, train=train), "cpu"))


def test_config_holds_the_model_and_the_loss_it_was_trained_with():
    theirs = read_config(GOLDEN)
    assert (theirs.model.num_experts, theirs.model.num_heads, theirs.model.num_kv_heads) == (8, 8, 2)
    assert (theirs.model.head_dim, theirs.model.rope_theta, theirs.model.dtype) == (8, 1e6, "float32")
    assert theirs.router.num_experts_per_token == 2
    assert (theirs.router.load_balance.weight, theirs.router.load_balance.normalization) == (0.02, "hf")
    assert theirs.router.z_loss_weight == 0


def test_config_of_transformers_4_is_read_too(folder: Path):
    rewrite_config(
        folder,
        without=("rope_parameters", "dtype", "head_dim"),
        rope_theta=5e4,
        rope_scaling=None,
        torch_dtype="bfloat16",
    )
    model = read_config(folder).model
    assert (model.rope_theta, model.dtype, model.param_dtype, model.head_dim) == (5e4, "bfloat16", "bfloat16", 8)


def test_config_of_another_model_is_refused_with_every_reason(folder: Path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e6}
    rewrite_config(folder, without=("num_local_experts",), sliding_window=4096, hidden_act="gelu", rope_parameters=yarn)
    with pytest.raises(
        ConfigError, match=r"num_local_experts.*hidden_act='gelu'.*sliding_window=4096.*rope_type='yarn'"
    ):
        read_config(folder)


def test_a_folder_without_files_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    with jax.set_mesh(mesh_of()), pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load_weights(tmp_path, shapes_of(GOLDEN))


def test_a_misfit_lists_every_tensor_that_is_missing_unexpected_or_misshapen(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    save_file(tensors, folder / "model.safetensors")
    with jax.set_mesh(mesh_of()), pytest.raises(ConfigError) as raised:
        load_weights(folder, shapes_of(folder))
    message = str(raised.value)
    assert "model.layers.1.block_sparse_moe.experts.5.w2.weight is missing" in message
    assert "model.layers.0.self_attn.q_proj.bias is unexpected" in message
    assert "lm_head.weight has shape (64, 512), not (512, 64)" in message
    assert message.count(";") == 2


def test_layouts_cover_every_parameter_once():
    with jax.set_mesh(mesh_of()):
        paths = jax.tree.flatten_with_path(shapes_of(GOLDEN))[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in paths]
    assert sorted(names) == sorted(layout.parameter for layout in LAYOUTS)


@pytest.mark.parametrize(
    "sizes", [{"expert": 8}, {"expert": 4, "fsdp": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str
)
def test_weights_are_the_same_on_every_mesh_and_no_device_holds_more_than_its_part(sizes: dict[str, int]):
    with jax.set_mesh(mesh_of()):
        whole = load_weights(GOLDEN, shapes_of(GOLDEN))
    with jax.set_mesh(mesh_of(**sizes)):
        shapes = shapes_of(GOLDEN)
        spread = load_weights(GOLDEN, shapes)
    for expected, shape, got in zip(*map(jax.tree.leaves, (whole, shapes, spread)), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.sharding.spec == shape.sharding.spec
    gate = spread.blocks.moe.experts.gate.weight[...]
    assert {shard.data.nbytes for shard in gate.addressable_shards} == {gate.nbytes // 8}


def test_weights_stored_in_bfloat16_are_cast_to_the_dtype_of_the_model(folder: Path):
    stored = {name: array.astype(jax.numpy.bfloat16) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    with jax.set_mesh(mesh_of(expert=2)):
        model = load_weights(folder, shapes_of(folder))
    embedding = np.asarray(model.embedding_VD[...])
    assert embedding.dtype == np.float32
    np.testing.assert_array_equal(embedding, stored["model.embed_tokens.weight"].astype(np.float32))
