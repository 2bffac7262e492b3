"""Runs of train.py that start from a dense model, or have shared experts: from nothing, gone on
with, refused.
"""

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.checkpoint.export import make_small_files
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from tests.scripts import finish, free_port, lines_of, start

pytestmark = pytest.mark.runs

FROM_NOTHING = (
    "--config.upcycle.method=copy",
    "--config.upcycle.pretrain.num_steps=40",
    "--config.upcycle.pretrain.batch_size=8",
    "--config.upcycle.pretrain.learning_rate=0.01",
    "--config.model.granularity=2",
    "--config.optimizer.learning_rate=1e-3",
)


def train(folder, name, *flags):
    """What a run that ends well has printed."""
    code, output, errors = finish(start(folder, f"--workdir={folder / name}", *flags))
    assert code == 0, errors
    return output


@pytest.fixture(scope="module")
def upcycled(folder):
    return train(folder, "run", "--config.train.num_steps=4", *FROM_NOTHING)


def test_a_run_from_nothing_pretrains_a_dense_model_and_starts_at_its_loss(folder, upcycled):
    base, lines = lines_of(folder / "run" / "base"), lines_of(folder / "run")
    assert [len(base), len(lines)] == [40, 4]
    assert base[-1]["loss"] < base[0]["loss"] - 1
    assert lines[0]["loss"] == pytest.approx(base[-1]["loss"], abs=0.2)
    assert "pretraining a dense model" in upcycled and "top-4 of 16 experts" in upcycled
    tokenizers = [(folder / "run" / part / "tokenizer.model").read_bytes() for part in ("", "base")]
    assert tokenizers[0] == tokenizers[1]


def test_a_run_that_goes_on_needs_its_dense_model_no_more(folder, upcycled):
    (folder / "run" / "base").rename(folder / "dense")
    output = train(folder, "run", "--config.train.num_steps=6", *FROM_NOTHING)
    assert "resuming after step 4 of 6" in output and "dense" not in output
    assert [line["step"] for line in lines_of(folder / "run")] == [1, 2, 3, 4, 5, 6]
    loaded = mixtral_jax.load_pretrained(folder / "run")
    model = loaded.config.model
    assert (model.num_experts, model.intermediate_size, model.granularity) == (16, 16, 1)
    assert isinstance(loaded.generate("line 1: the", max_new_tokens=3), str)


def test_a_base_that_does_not_fit_is_one_line_that_lists_all(folder, upcycled):
    dense = next(path for path in (folder / "dense", folder / "run" / "base") if path.exists())
    flags = (
        f"--config.upcycle.base={dense}",
        "--config.model.hidden_size=64",
        "--config.model.num_layers=1",
    )
    code, output, errors = finish(start(folder, f"--workdir={folder / 'misfit'}", *flags))
    assert code == 2 and "compiling" not in output and errors.strip().count("\n") == 0
    assert f"upcycle.base={dense} does not fit the run" in errors
    for word in (
        "hidden_size is 32",
        "model.hidden_size=64",
        "num_layers is 2",
        "model.num_layers=1",
    ):
        assert word in errors


def test_a_tokenizer_beside_a_base_that_has_one_is_refused(folder, upcycled):
    dense = next(path for path in (folder / "dense", folder / "run" / "base") if path.exists())
    flags = (f"--config.upcycle.base={dense}", "--config.data.tokenizer=train:320")
    code, _, errors = finish(start(folder, f"--workdir={folder / 'void'}", *flags))
    assert code == 2 and errors.strip().count("\n") == 0
    assert f"upcycle.base={dense} decides data.tokenizer" in errors and "leave it out" in errors


@pytest.mark.full
def test_two_processes_upcycle_from_nothing_as_one_does(folder):
    flags = ("--config.train.num_steps=4", *FROM_NOTHING, "--config.upcycle.method=drop")
    train(folder, "one", *flags)
    several = (
        f"--coordinator=localhost:{free_port()}",
        "--num_processes=2",
        "--config.mesh.cpu_devices=4",
    )
    two = [
        start(folder, f"--workdir={folder / 'two'}", *flags, *several, f"--process_id={index}")
        for index in range(2)
    ]
    ends = [finish(process) for process in two]
    assert [code for code, _, _ in ends] == [0, 0], ends
    for part in ("base", ""):
        losses = [
            [line["loss"] for line in lines_of(folder / name / part)] for name in ("one", "two")
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_with_shared_experts_trains_loads_and_is_not_exported(folder):
    output = train(
        folder, "shared", "--config.train.num_steps=2", "--config.model.num_shared_experts=2"
    )
    assert "top-2 of 8 experts, and 2 shared" in output
    loaded = mixtral_jax.load_pretrained(folder / "shared")
    assert loaded.model.blocks.moe.shared_experts.gate.weight.shape == (2, 32, 64)
    assert loaded.generate([1, 5, 9], max_new_tokens=3)
    with pytest.raises(ConfigError, match=r"cannot have model\.num_shared_experts=2"):
        make_small_files(open_weights(folder / "shared"), "hf")
