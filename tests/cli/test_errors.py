"""What a user gets wrong is answered with one line that names the value, the rule and the fix."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.cli.flags import parse_run_flags
from mixtral_jax.config import Config, ConfigError, DataConfig, build
from mixtral_jax.data.text import prepare_text
from mixtral_jax.parallel.mesh import resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.run import start_run
from mixtral_jax.runs.workdir import open_workdir, release_workdirs
from tests.cases import small_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/pretrain/tiny.py"


def parse(*arguments):
    return parse_run_flags(arguments, description="", default_config="pretrain/tiny.py")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.model.num_layer=3", ["model.num_layer", "did you mean model.num_layers"]),
        ("--config.trian.num_steps=3", ["trian", "did you mean train"]),
        ("--config.train.num_steps=many", ["train.num_steps='many'", "whole number"]),
        ("--config.train.num_steps=0", ["train.num_steps=0", "at least 1"]),
        ("--config.optimizer.learning_rate=nan", ["optimizer.learning_rate", "finite number"]),
        ("--config.data.suffixes=py,.md", ["data.suffixes=py,.md", "with their dots"]),
        ("--config.model.dtype=float16", ["model.dtype='float16'", "bfloat16", "float32"]),
        ("--config.train=3", ["train", "section"]),
        ("--config.train.num_steps", ["needs a value"]),
        ("--config.train.num_steps.more=1", ["train.num_steps", "not a section"]),
        ("--learning_rate=3", ["--learning_rate=3", "--config.KEY=VALUE"]),
        ("--config=nowhere.py", ["nowhere.py", "no such file"]),
        ("--config.mesh.context=2", ["mesh.context=2", "not built"]),
        ("--config.model.num_kv_heads=3", ["model.num_heads=4", "model.num_kv_heads=3"]),
        (
            "--config.router.num_experts_per_token=9",
            ["router.num_experts_per_token=9", "model.num_experts=8"],
        ),
        (
            "--config.train.gradient_accumulation=3",
            ["train.batch_size", "train.gradient_accumulation=3"],
        ),
        ("--config.dispatch.transport=teleport", ["teleport", "all_gather"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_would_be_right(argument, words):
    with pytest.raises(ConfigError) as error:
        parse(argument)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_none_numbers_and_text_are_read_as_the_key_wants_them():
    flags = parse(
        "--config.dispatch.capacity_factor=1.25",
        "--config.data.path=7",
        "--config.log.tensorboard=false",
    )
    assert flags.config.dispatch.capacity_factor == 1.25
    assert flags.config.data.path == "7"
    assert flags.config.log.tensorboard is False
    assert parse("--config.dispatch.capacity_factor=None").config.dispatch.capacity_factor is None


@pytest.mark.parametrize(
    ("mesh", "devices", "words"),
    [
        ({"expert": 3}, 8, ["expert=3", "8 devices"]),
        ({"data": 2, "expert": 2}, 8, ["data=2 x expert=2", "4 of 8"]),
        ({"expert": 16}, 16, ["model.num_experts=8", "mesh.expert=16", "may take 1, 2, 4, 8"]),
        ({"tensor": 4}, 8, ["model.num_kv_heads=2", "mesh.tensor=4"]),
        ({"data": 16}, 16, ["train.batch_size", "16"]),
        ({"fsdp": 8, "expert": 8}, 64, ["model.hidden_size=32", "mesh.fsdp x mesh.expert=64"]),
        ({"data": -1, "fsdp": -1}, 8, ["data and fsdp", "-1"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, devices, words):
    with pytest.raises(ConfigError) as error:
        resolve_mesh(
            small_config(**{f"mesh__{axis}": size for axis, size in mesh.items()}), devices
        )
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("asked", "devices", "expected"),
    [
        ({}, 1, {"data": 1, "expert": 1}),
        ({}, 4, {"data": 1, "expert": 4}),
        ({}, 8, {"data": 1, "expert": 8}),
        ({"fsdp": 2}, 8, {"fsdp": 2, "expert": 4, "data": 1}),
        ({"expert": 2}, 8, {"expert": 2, "data": 4}),
        ({"data": 8}, 8, {"data": 8, "expert": 1}),
        ({"fsdp": -1, "expert": 2}, 8, {"fsdp": 4, "data": 1}),
        ({"tensor": 2}, 2, {"tensor": 2, "expert": 1, "data": 1}),
    ],
)
def test_the_mesh_fills_the_devices_by_default_with_experts_first(asked, devices, expected):
    mesh = resolve_mesh(
        small_config(**{f"mesh__{axis}": size for axis, size in asked.items()}), devices
    ).mesh
    for axis, size in expected.items():
        assert getattr(mesh, axis) == size


def test_missing_keys_are_listed():
    with pytest.raises(ConfigError, match=r"lacks model\.vocab_size, .*model\.num_experts"):
        build(
            Config, {"model": {}, "train": {"num_steps": 1, "batch_size": 1, "sequence_length": 8}}
        )


@pytest.mark.runs
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.data.path=nowhere", ["data.path=nowhere"]),
        ("--config.mesh.expert=3", ["expert=3", "8 devices"]),
        ("--config.model.vocab_size=100", ["model.vocab_size=100"]),
        ("--config.finetune.lora.rank=8", ["section finetune", "finetune_instruct.py"]),
    ],
)
def test_train_exits_2_with_one_line(tmp_path, argument, words):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={TINY}",
        f"--workdir={tmp_path / 'run'}",
        argument,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.strip().count("\n") == 0
    for word in words:
        assert word in done.stderr


def test_float16_is_not_trained_in():
    with pytest.raises(ConfigError, match=r"model\.param_dtype=float16 .* use float32 or bfloat16"):
        start_run(parse("--config.model.param_dtype=float16").config, Path("run"), Processes())


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be written"):
            open_workdir(workdir, small_config(), Processes())
    with pytest.raises(ConfigError, match="empty"):
        parse("--workdir=")


def test_a_workdir_serves_one_run_at_a_time(tmp_path):
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as held_by_another_run:
        fcntl.flock(held_by_another_run, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another run"):
            open_workdir(tmp_path, small_config(), Processes())
    for _ in range(2):  # A process may open its own workdir again.
        open_workdir(tmp_path, small_config(), Processes())
    with (tmp_path / ".lock").open() as another, pytest.raises(BlockingIOError):
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release_workdirs()
    with (tmp_path / ".lock").open() as another:
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_before_it_is_trained(tmp_path):
    config = DataConfig(path=str(tmp_path / "nothing is read.txt"), tokenizer="train:4096")
    with pytest.raises(ConfigError, match=r"train:4096 .*model\.vocab_size=2048"):
        prepare_text(config, 2048, tmp_path / "tokenizer.model", is_writer=True)


@pytest.mark.parametrize(
    ("source", "words"), [("", "get_config"), ("def get_config(): return 3", "does not run")]
)
def test_a_config_file_without_a_config_is_refused(tmp_path, source, words):
    (tmp_path / "c.py").write_text(source)
    with pytest.raises(ConfigError, match=words):
        parse(f"--config={tmp_path / 'c.py'}")
    with pytest.raises(ConfigError, match="is a folder"):
        parse(f"--config={tmp_path}")


def test_a_reader_that_has_gone_ends_a_verb_without_a_word():
    program = """
from mixtral_jax.cli.flags import run_command
from mixtral_jax.cli.output import claim_stdout

def main(arguments):
    with claim_stdout() as output:
        output.write("text")
    return 0

run_command(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == b""
    process.stderr.close()
