"""What a run does on a signal, and what it says while it runs."""

import io
import os
import signal
from unittest.mock import Mock

import pytest
from rich.console import Console

from mixtral_jax.config import CheckpointConfig
from mixtral_jax.runs.console import RunProgress
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.training.loop import TrainLoop
from tests.cases import small_config

RECORD = {
    "step": 1234,
    "loss": 4.56789,
    "load_balance_loss": 1.23456,
    "tokens_per_second": 123456.7,
    "router/max_violation": 0.5,
    "router/dropped_fraction": 0.125,
    "router/overflowed_fraction": 0.0,
}


def test_a_signal_with_nothing_to_save_ends_the_run_with_75():
    with pytest.raises(SystemExit) as stopped, StopSignal() as stop, stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 75


def test_a_signal_during_a_step_waits_for_the_loop_to_see_it():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.is_due()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_due()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_before_the_first_step_ends_the_run_before_it_compiles():
    said, unused = io.StringIO(), Mock(side_effect=AssertionError)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        loop = TrainLoop(
            config=small_config().train,
            checkpoint=CheckpointConfig(),
            train_step=unused,
            batches=iter(()),
            evaluate=unused,
            checkpoints=unused,
            log=unused,
            progress=RunProgress(Console(file=said), 7, 12),
            is_stop_requested=stop.is_due,
            record={},
        )
        ending = loop.run(Mock(step=7))
    assert ending.outcome == "stopped"
    assert said.getvalue().startswith("stopped before step 8")


def test_progress_is_whole_in_a_terminal_of_80_columns():
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, width=80, color_system=None, legacy_windows=False
    )
    with RunProgress(console, 0, 9999) as progress:
        progress.report(RECORD)
    assert "step 1234/9999" in screen.getvalue()
    assert "loss 4.568 balance 1.235 123,457 tokens/s 0:00:00 left" in screen.getvalue()


def test_progress_is_a_line_a_report_elsewhere():
    lines = io.StringIO()
    with RunProgress(Console(file=lines, width=200), 0, 9999) as progress:
        progress.report(RECORD)
    (line,) = lines.getvalue().splitlines()
    assert line.startswith("step 1234/9999 loss 4.568") and line.endswith(
        "max violation 0.50 dropped 12.5%"
    )
