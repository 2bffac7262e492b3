"""What goes in comes out, bit for bit: through a run's checkpoint and other programs' formats."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mixtral_jax.checkpoint.export import write_folder
from mixtral_jax.checkpoint.files import file_tensor, stored
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ModelConfig
from mixtral_jax.runs.import_weights import import_weights
from tests.checkpoint.folders import (
    SMALL,
    assert_same_weights,
    random_parameters,
    random_weights,
    read_all,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def random_model(seed: int) -> tuple[ModelConfig, int, str]:
    """Random sizes, experts per token and dtype; hardly any two sizes are equal."""
    rng = np.random.default_rng(seed)
    num_kv_heads, num_experts = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    model = ModelConfig(
        vocab_size=int(rng.integers(3, 40)),
        hidden_size=int(rng.integers(1, 20)),
        intermediate_size=int(rng.integers(1, 20)),
        num_layers=int(rng.integers(1, 4)),
        num_heads=num_kv_heads * int(rng.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * int(rng.integers(1, 6)),
        num_experts=num_experts,
        rope_theta=float(rng.choice([1e4, 1e6, 12_345.5])),
        norm_eps=float(rng.choice([1e-5, 1e-6])),
    )
    return model, int(rng.integers(1, num_experts + 1)), str(rng.choice(list(DTYPES)))


@pytest.mark.parametrize("seed", range(8))
def test_random_models_come_back_through_both_formats_and_a_run(seed, tmp_path):
    model, chosen, dtype = random_model(seed)
    weights = random_weights(model, chosen, dtype)
    for number, (format_, is_imported) in enumerate(
        (("hf", True), ("mistral", True), ("hf", False))
    ):
        folder = tmp_path / f"{number}-{format_}"
        folder.mkdir()
        write_folder(weights, folder, format_, lambda _: None)
        found = open_weights(folder)
        assert_same_weights(found, weights)
        wanted = dataclasses.replace(
            model, dtype="bfloat16" if dtype == "bfloat16" else "float32", param_dtype=dtype
        )
        assert found.architecture.model == wanted
        assert found.architecture.router.num_experts_per_token == chosen
        if is_imported:
            import_weights(found, tmp_path / f"{number}-run")
            found = open_weights(tmp_path / f"{number}-run")
            assert_same_weights(found, weights)
            assert found.architecture.model == wanted
        weights = found


@pytest.mark.parametrize("folder", ["hf_tiny", "mistral_tiny"])
def test_the_files_that_other_programs_wrote_are_written_again(folder, tmp_path):
    """hf -> run -> mistral -> hf, and mistral -> run -> mistral -> hf: equal names and bits."""
    import_weights(open_weights(GOLDEN / folder), tmp_path / "run")
    assert (
        run_verb(
            [
                "export",
                f"--checkpoint={tmp_path / 'run'}",
                f"--to={tmp_path / 'm'}",
                "--format=mistral",
            ]
        )
        == 0
    )
    assert run_verb(["export", f"--checkpoint={tmp_path / 'm'}", f"--to={tmp_path / 'h'}"]) == 0
    for found, expected in (
        (
            tmp_path / "m" / "consolidated.safetensors",
            GOLDEN / "mistral_tiny" / "consolidated.safetensors",
        ),
        (tmp_path / "h" / "model.safetensors", GOLDEN / "hf_tiny" / "model.safetensors"),
    ):
        ours, theirs = load_file(found), load_file(expected)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].tobytes() == theirs[name].tobytes(), name


def test_the_chunk_of_an_imported_expert_has_the_bytes_of_its_tensor(tmp_path):
    """Nothing is transposed on the way: the zarr array has Fortran order."""
    import_weights(open_weights(GOLDEN / "hf_tiny"), tmp_path / "run")
    tensors = load_file(GOLDEN / "hf_tiny" / "model.safetensors")
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        chunks = (
            tmp_path / f"run/checkpoints/0/state/trained/blocks/moe/experts/{ours}/weight/value"
        )
        assert json.loads((chunks / ".zarray").read_text())["order"] == "F"
        tensor = tensors[f"model.layers.1.block_sparse_moe.experts.5.{theirs}.weight"]
        assert (chunks / "1.5.0.0").read_bytes() == tensor.tobytes()


@pytest.mark.parametrize("folder", ["hf_tiny", "mistral_tiny"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_chunks_that_are_copied_in_parts_are_whole(folder, dtype, tmp_path, monkeypatch):
    weights = open_weights(GOLDEN / folder)
    weights = weights.astype(dtype) if dtype else weights
    expected = read_all(weights)
    monkeypatch.setattr(stored, "PART_BYTES", 1000)
    monkeypatch.setattr(file_tensor, "PART_BYTES", 300)
    import_weights(weights, tmp_path / "run")
    for name, array in read_all(open_weights(tmp_path / "run")).items():
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_imported_is_a_checkpoint_as_orbax_restores_it(dtype, tmp_path):
    import_weights(random_weights(SMALL, 2, dtype), tmp_path / "run")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    expected = random_parameters(SMALL, dtype)
    wanted = {
        f"trained/{name}/value": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
        for name, array in expected.items()
    }
    with RunCheckpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() == 0
        assert checkpoints.read_record(0)["tokens"] == 0
        restored = checkpoints.restore(0, wanted)
    for name, array in expected.items():
        np.testing.assert_array_equal(restored[f"trained/{name}/value"], array, err_msg=name)
