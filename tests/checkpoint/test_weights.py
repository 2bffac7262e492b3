"""All kinds of folders open to the same weights, which load onto any mesh."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint import on_devices, run_parameters
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE, LAYOUTS, MISTRAL
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS
from mixtral_jax.checkpoint.on_devices import load_model, parameter_name
from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.config import ConfigError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.training.optimizer import make_optimizer
from mixtral_jax.training.state import init_state
from tests.cases import cpu_model_maker, mesh_of, small_config
from tests.checkpoint.folders import (
    SMALL,
    in_memory,
    random_parameters,
    read_all,
    tensors_of,
    write_config,
    write_params,
    write_shards,
    write_torch,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MEGABLOCKS = LAYOUTS[-1]


def assert_equal(found: Weights, expected: dict[str, np.ndarray]) -> None:
    for name, array in read_all(found).items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def shapes_of(weights: Weights) -> Transformer:
    return jax.eval_shape(cpu_model_maker(weights.architecture.config()))


def test_the_golden_folders_of_both_programs_hold_the_same_model():
    theirs, native = open_weights(GOLDEN / "hf_tiny"), open_weights(GOLDEN / "mistral_tiny")
    assert_equal(native, read_all(theirs))
    assert native.architecture.model == theirs.architecture.model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("layout", [HUGGING_FACE, MISTRAL], ids=lambda layout: layout.name)
def test_safetensors_open_in_every_dtype_whole_or_in_shards(layout, num_shards, dtype, tmp_path):
    parameters = random_parameters(SMALL, dtype)
    tensors = tensors_of(layout, parameters, SMALL)
    is_native = layout is MISTRAL
    (write_params if is_native else write_config)(tmp_path, SMALL)
    stem = "consolidated" if is_native else "model"
    if num_shards == 1:
        save_file(tensors, tmp_path / f"{stem}.safetensors", metadata={"format": "pt"})
    else:
        write_shards(tmp_path, stem, tensors, num_shards)
    found = open_weights(tmp_path)
    assert_equal(found, parameters)
    held_in = (found.architecture.model.dtype, found.architecture.model.param_dtype)
    assert held_in == ("bfloat16" if dtype == "bfloat16" else "float32", dtype)


@pytest.mark.parametrize(("layout", "num_files"), [(MISTRAL, 1), (MEGABLOCKS, 8)])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("config", [write_params, write_config])
def test_files_of_torch_open_without_torch(layout, num_files, suffix, config, tmp_path):
    parameters = random_parameters(SMALL, "bfloat16")
    tensors = tensors_of(layout, parameters, SMALL)
    config(tmp_path, SMALL)
    for number in range(num_files):
        here = {name: tensors[name] for name in list(tensors)[number::num_files]}
        write_torch(tmp_path / f"consolidated.{number:02}.{suffix}", here)
    assert_equal(open_weights(tmp_path), parameters)


def test_tensors_of_several_dtypes_are_kept_and_held_in_the_widest(tmp_path):
    tensors = tensors_of(HUGGING_FACE, random_parameters(SMALL, "bfloat16"), SMALL)
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].astype(np.float32)
    write_config(tmp_path, SMALL)
    save_file(tensors, tmp_path / "model.safetensors")
    found = open_weights(tmp_path)
    assert found.architecture.model.param_dtype == "float32"
    assert found.parameters["norm/scale"].dtype == np.float32
    assert found.parameters["embedding_VD"].dtype == DTYPES["bfloat16"]


def test_a_cast_that_overflows_is_refused():
    parameters = random_parameters(SMALL)
    parameters["norm/scale"][3] = 1e5
    stored = in_memory(parameters, SMALL)["norm/scale"]
    assert np.isfinite(
        stored.astype(DTYPES["bfloat16"]).read(stored.whole).astype(np.float32)
    ).all()
    with pytest.raises(
        ConfigError, match=r"norm/scale holds numbers that are too large for float16"
    ):
        stored.astype(DTYPES["float16"]).read(stored.whole)


def test_a_cache_of_hugging_face_may_link_to_its_own_blobs(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (blobs / str(number)).write_bytes((GOLDEN / "hf_tiny" / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    assert_equal(open_weights(snapshot), read_all(open_weights(GOLDEN / "hf_tiny")))


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 8}, {"expert": 4, "fsdp": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2}],
    ids=str,
)
@pytest.mark.parametrize("max_bytes_at_once", [2**26, 0], ids=["at once", "in blocks"])
def test_weights_are_the_same_on_every_mesh_and_no_device_holds_more_than_its_part(
    sizes, max_bytes_at_once, monkeypatch
):
    monkeypatch.setattr(on_devices, "MAX_BYTES_AT_ONCE", max_bytes_at_once)
    weights = open_weights(GOLDEN / "hf_tiny")
    expected = read_all(weights)
    with jax.set_mesh(mesh_of(**sizes)):
        shapes = shapes_of(weights)
        model = load_model(weights.parameters, shapes)
    for array, leaf, got in zip(
        expected.values(), jax.tree.leaves(shapes), jax.tree.leaves(model), strict=False
    ):
        assert got.sharding.spec == leaf.sharding.spec, array.shape
    found = {
        "embedding_VD": model.embedding_VD,
        "blocks/moe/experts/gate/weight": model.blocks.moe.experts.gate.weight,
    }
    found |= {
        "blocks/attention/query/weight": model.blocks.attention.query.weight,
        "norm/scale": model.norm.scale,
    }
    for name, parameter in found.items():
        np.testing.assert_array_equal(parameter[...], expected[name], err_msg=name)
    gate = model.blocks.moe.experts.gate.weight[...]
    num_parts = math.prod(size for axis, size in sizes.items() if axis != "data")
    assert {shard.data.nbytes for shard in gate.addressable_shards} == {gate.nbytes // num_parts}


def test_weights_are_cast_to_the_dtype_of_the_model():
    weights = open_weights(GOLDEN / "hf_tiny").astype("bfloat16")
    with jax.set_mesh(mesh_of(expert=2)):
        model = load_model(weights.parameters, shapes_of(weights))
    expected = load_file(GOLDEN / "hf_tiny" / "model.safetensors")["model.embed_tokens.weight"]
    assert model.embedding_VD[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(model.embedding_VD[...], expected.astype(jnp.bfloat16))


def test_parameters_that_do_not_fit_the_model_are_all_listed():
    weights = open_weights(GOLDEN / "hf_tiny")
    parameters = dict(weights.parameters)
    parameters["more"] = parameters.pop("norm/scale")
    parameters["embedding_VD"] = parameters["unembed/weight"]
    with jax.set_mesh(mesh_of()), pytest.raises(ConfigError) as raised:
        load_model(parameters, shapes_of(weights))
    assert str(raised.value) == (
        "the weights do not fit the model: embedding_VD has shape (64, 512), not (512, 64); more "
        "is unexpected; norm/scale is missing; use the config that belongs to the weights"
    )


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's workdir, and its parameters by name at each saved step."""

    workdir: Path
    steps: dict[int, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """A training run with the whole state of steps 2 and 10; the second is twice the first."""
    folder, steps = tmp_path_factory.mktemp("run"), {}
    config = small_config(router__num_experts_per_token=3, train__sequence_length=48)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with (
        jax.set_mesh(mesh_of(expert=2, fsdp=2)),
        RunCheckpoints(folder / "checkpoints", 2) as checkpoints,
    ):
        optimizer = make_optimizer(config.optimizer, lambda _: 1e-3)
        state = init_state(cpu_model_maker(config), optimizer)
        for step in (2, 10):
            leaves = jax.tree.flatten_with_path(state.trained)[0]
            steps[step] = {parameter_name(path): np.asarray(leaf) for path, leaf in leaves}
            checkpoints.save(step, state, {"tokens": step})
            checkpoints.wait()
            state = jax.tree.map(lambda leaf: leaf + leaf, state)
    return SavedRun(folder, steps)


def test_a_run_opens_at_its_newest_step_or_at_a_named_one(run):
    for folder, step in ((run.workdir, 10), (run.workdir / "checkpoints" / "2", 2)):
        found = open_weights(folder)
        assert found.record["tokens"] == step
        assert found.architecture.context_length == 48
        assert found.architecture.router.num_experts_per_token == 3
        assert_equal(found, run.steps[step])


def test_only_the_parameters_of_a_run_are_opened(run, monkeypatch):
    opened = []

    def open_(spec, **settings):
        opened.append(spec["kvstore"]["path"].partition("/")[0])
        return tensorstore.open(spec, **settings)

    monkeypatch.setattr(
        run_parameters, "tensorstore", SimpleNamespace(open=open_, Context=tensorstore.Context)
    )
    read_all(open_weights(run.workdir))
    assert opened == ["trained"] * len(PARAMETERS)


def test_a_chunk_in_a_runs_checkpoint_has_one_layer(run):
    """So that layers can be read one at a time, whatever the sharding was."""
    for name, stored in open_weights(run.workdir).parameters.items():
        is_stack_of_matrices = name.startswith("blocks/") and len(stored.shape) > 2
        assert stored.chunk[0] == 1 or not is_stack_of_matrices, name


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="has not saved a checkpoint yet"):
        open_weights(tmp_path)
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(ConfigError, match="has not saved a checkpoint yet"):
        open_weights(tmp_path)
