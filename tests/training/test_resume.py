"""A run that is stopped and started again writes what an unbroken one writes, bit for bit."""

import json
import signal

import pytest

from tests import scripts as runs
from tests.scripts import finish, lines_of, wait_for_step

pytestmark = pytest.mark.runs

STEPS = 60
FLAGS = (
    f"--config.train.num_steps={STEPS}",
    "--config.train.eval_every=20",
    "--config.checkpoint.every=10",
    "--config.mesh.cpu_devices=4",
)


def start(folder, name, *flags):
    """With XLA's own settings, as users' runs have them."""
    return runs.start(folder, *FLAGS, f"--workdir={folder / name}", *flags, XLA_FLAGS="")


@pytest.fixture(scope="module")
def failed(folder):
    """The exit code of a start in the workdir of the unbroken run, before it, without a text."""
    return finish(start(folder, "unbroken", "--config.data.path=nowhere"))[0]


@pytest.fixture(scope="module")
def unbroken(folder, failed):
    code, _, errors = finish(start(folder, "unbroken"))
    assert code == 0, errors
    return lines_of(folder / "unbroken")


def test_an_unbroken_run_logs_every_step_and_learns(unbroken):
    assert [line["step"] for line in unbroken] == list(range(1, STEPS + 1))
    assert [line["step"] for line in unbroken if "eval/loss" in line] == [20, 40, 60]
    assert unbroken[-1]["eval/loss"] < unbroken[19]["eval/loss"] < unbroken[0]["loss"]
    assert len({line["batch_hash"] for line in unbroken}) == STEPS


def test_a_start_that_failed_does_not_bind_its_workdir(folder, failed, unbroken):
    assert failed == 2
    config = json.loads((folder / "unbroken" / "config.json").read_text())
    assert config["data"]["path"] == str(folder / "text.txt")


def test_resume_after_sigterm_equals_straight_through(folder, unbroken):
    process = start(folder, "terminated")
    wait_for_step(process, folder / "terminated" / "metrics.jsonl", 37)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 75, errors
    assert 37 <= lines_of(folder / "terminated")[-1]["step"] < STEPS
    code, _, errors = finish(start(folder, "terminated"))
    assert code == 0, errors
    assert lines_of(folder / "terminated") == unbroken


def test_resume_after_sigkill_equals_straight_through(folder, unbroken):
    process = start(folder, "killed")
    wait_for_step(process, folder / "killed" / "metrics.jsonl", 37)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, _, errors = finish(start(folder, "killed"))
    assert code == 0, errors
    assert lines_of(folder / "killed") == unbroken


def test_a_changed_config_is_refused_by_name_and_a_longer_run_is_not(folder, unbroken):
    code, _, errors = finish(start(folder, "unbroken", "--config.optimizer.learning_rate=0.5"))
    assert code == 2
    assert errors.strip().count("\n") == 0
    assert "optimizer.learning_rate (0.004 -> 0.5)" in errors
    code, printed, errors = finish(
        start(folder, "unbroken", "--config.train.num_steps=62", "--config.mesh.fsdp=2")
    )
    assert code == 0, errors
    assert f"train.num_steps was {STEPS}, and is now 62: the learning rate" in printed
    assert [line["step"] for line in lines_of(folder / "unbroken")] == list(range(1, 63))
