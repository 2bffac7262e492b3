"""A run that is stopped and started again writes what an unbroken one writes, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 60
FLAGS = [
    f"--config.train.num_steps={STEPS}", "--config.train.log_every=1", "--config.train.eval_every=20",
    "--config.train.batch_size=8", "--config.train.sequence_length=32", "--config.train.eval_sequences=8",
    "--config.checkpoint.every=10", "--config.data.tokenizer=train:320", "--config.model.vocab_size=320",
    "--config.model.hidden_size=32", "--config.model.intermediate_size=32", "--config.model.num_layers=2",
    "--config.model.num_heads=2", "--config.model.num_kv_heads=1", "--config.model.head_dim=16",
    "--config.mesh.cpu_devices=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a text file of 400 lines; runs and their caches live beside it."""
    folder = tmp_path_factory.mktemp("runs")
    animals = ("fox", "dog", "crow", "cat")
    lines = (f"line {n}: the quick {animals[n % 4]} of {n * n % 97} hills" for n in range(400))
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def start(folder, name, *extra):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / 'configs/pretrain/tiny.py'}", *FLAGS]
    command += [f"--config.data.path={folder / 'text.txt'}", f"--workdir={folder / name}", *extra]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    # One set of executables for every start: compiling them is most of the time of a run this short.
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def send_at(process, metrics: Path, step: int, number: int):
    """Sends a signal once the metrics file has a line for `step`."""
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)


def lines_of(workdir: Path):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def unbroken(folder):
    code, errors = finish(start(folder, "unbroken"))
    assert code == 0, errors
    return lines_of(folder / "unbroken")


def test_an_unbroken_run_logs_every_step_and_learns(unbroken):
    assert [line["step"] for line in unbroken] == list(range(1, STEPS + 1))
    assert [line["step"] for line in unbroken if "eval/loss" in line] == [20, 40, 60]
    assert unbroken[-1]["eval/loss"] < unbroken[19]["eval/loss"] < unbroken[0]["loss"]
    assert len({line["batch_hash"] for line in unbroken}) == STEPS


def test_resume_after_sigterm_equals_straight_through(folder, unbroken):
    process = start(folder, "terminated")
    send_at(process, folder / "terminated" / "metrics.jsonl", 37, signal.SIGTERM)
    code, errors = finish(process)
    assert code == 75, errors
    assert 37 <= lines_of(folder / "terminated")[-1]["step"] < STEPS
    code, errors = finish(start(folder, "terminated"))
    assert code == 0, errors
    assert lines_of(folder / "terminated") == unbroken


def test_resume_after_sigkill_equals_straight_through(folder, unbroken):
    process = start(folder, "killed")
    send_at(process, folder / "killed" / "metrics.jsonl", 37, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, errors = finish(start(folder, "killed"))
    assert code == 0, errors
    assert lines_of(folder / "killed") == unbroken


def test_a_changed_config_is_refused_by_name_and_a_longer_run_is_not(folder, unbroken):
    code, errors = finish(start(folder, "unbroken", "--config.optimizer.learning_rate=0.5"))
    assert code == 2
    assert errors.strip().count("\n") == 0
    assert "optimizer.learning_rate (0.004 -> 0.5)" in errors
    code, errors = finish(start(folder, "unbroken", "--config.train.num_steps=62", "--config.mesh.fsdp=2"))
    assert code == 0, errors
    assert [line["step"] for line in lines_of(folder / "unbroken")] == list(range(1, 63))


def test_a_start_that_failed_does_not_bind_its_workdir(folder):
    wrong = start(folder, "mended", "--config.data.path=nowhere")
    assert finish(wrong)[0] == 2
    code, errors = finish(start(folder, "mended", "--config.train.num_steps=2"))
    assert code == 0, errors
