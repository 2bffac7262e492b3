"""The progress of a run, for people: a live bar in a terminal, a line a report elsewhere."""

import datetime
import sys
import time
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def make_console(is_writer: bool = True, output: IO[str] | None = None) -> Console:
    """Prints on standard output, or `output`; silent on all processes but one.

    Lines are not wrapped into pipes.
    """
    is_terminal = (output or sys.stdout).isatty()
    return Console(quiet=not is_writer, highlight=False, soft_wrap=not is_terminal, file=output)


class RunProgress:
    """Reports steps as they end. Use as a context."""

    def __init__(self, console: Console, first_step: int, num_steps: int):
        self._console = console
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"), BarColumn(bar_width=10),
            TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step)
        self._first_step = first_step
        self._since = time.monotonic()

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start_clock(self) -> None:
        """Guesses of the time left count from here: compiling is over."""
        self._since = time.monotonic()

    def report(self, record: dict[str, Any]) -> None:
        """Says where the run is: loss, balance, speed and the time left, guessed from the time so
        far.
        """
        step = record["step"]
        elapsed = time.monotonic() - self._since
        left = elapsed / max(step - self._first_step, 1) * (self._num_steps - step)
        # Short, so that the line of the bar fits a terminal of 80 columns.
        text = (
            f"loss {record['loss']:.3f} balance {record['load_balance_loss']:.3f} "
            f"{record['tokens_per_second']:,.0f} tokens/s "
            f"{datetime.timedelta(seconds=round(left))} left"
        )
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal:
            text += f" max violation {record['router/max_violation']:.2f}"
            for lost in ("dropped", "overflowed"):
                fraction = record[f"router/{lost}_fraction"]
                text += f" {lost} {fraction:.1%}" if fraction else ""
            self._console.print(f"step {step}/{self._num_steps} {text}")
        if "eval/loss" in record:
            self._console.print(
                f"[bold]held-out[/] at step {step}: loss {record['eval/loss']:.3f}, "
                f"{record['eval/bits_per_byte']:.3f} bits/byte{_describe_baselines(record)}"
            )


def _describe_baselines(record: dict[str, Any]) -> str:
    """Bits per byte of simpler models, by name, where the evaluation gave them."""
    prefix = "eval/bits_per_byte_"
    named = [f"{key.removeprefix(prefix)} {record[key]:.3f}" for key in record if key.startswith(prefix)]
    return f" ({', '.join(named)})" if named else ""
