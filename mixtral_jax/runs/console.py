"""What people see of a run: lines, notes, bars, tables and sizes, in one place."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)
from rich.table import Table

Item = TypeVar("Item")


def make_console(is_writer: bool = True, output: IO[str] | None = None) -> Console:
    """A console on standard output, or on `output`; silent unless `is_writer`.

    Lines are not wrapped unless it is a terminal.
    """
    is_terminal = (output or sys.stdout).isatty()
    return Console(quiet=not is_writer, highlight=False, soft_wrap=not is_terminal, file=output)


def note(text: object, *, is_shown: bool = True) -> None:
    """Prints a line on standard error; of several processes, only one should show it."""
    if is_shown:
        print(text, file=sys.stderr, flush=True)


def print_notes(notes: Iterable[str], *, is_shown: bool = True) -> None:
    """Prints what people should know of a model that they opened, each as a `note`."""
    for text in notes:
        note(f"note: {text}", is_shown=is_shown)


def in_gib(num_bytes: float) -> str:
    """A size for people, as `3.50 GiB`, or `3.50 MiB` below 0.1 GiB."""
    if num_bytes < 2**30 / 10:
        return f"{num_bytes / 2**20:,.2f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"


def make_table(*headings: str) -> Table:
    """A table without lines; a heading that begins with > is right-aligned, for numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        justify = "right" if heading.startswith(">") else "left"
        table.add_column(heading.lstrip(">"), justify=justify, no_wrap=True)
    return table


def show_progress(items: Iterable[Item], title: str, total: int, is_shown: bool) -> Iterable[Item]:
    """The same items; while they are taken, a terminal shows a bar."""
    console = Console(file=sys.stderr)
    is_hidden = not (console.is_terminal and is_shown)
    return track(items, title, total, console=console, transient=True, disable=is_hidden)


@contextlib.contextmanager
def byte_progress(
    title: str, num_bytes: int, is_shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of bytes done; a terminal shows a bar."""
    console = Console(stderr=True, quiet=not is_shown)
    columns = (
        TextColumn(f"[bold]{title}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    is_hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda done: progress.advance(task, done)


class RunProgress:
    """The progress of a run: a live bar in a terminal, a line for each report elsewhere.

    Use as a context.
    """

    def __init__(self, console: Console, first_step: int, num_steps: int):
        self._console = console
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=10),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step)
        self._first_step = first_step
        self._since = time.monotonic()

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line)

    def start_clock(self) -> None:
        """Estimates of the time left count from here: compiling is over."""
        self._since = time.monotonic()

    def report(self, record: dict[str, Any]) -> None:
        """Shows where the run is: loss, balance, speed, and an estimate of the time left."""
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
    """Bits per byte of simpler models, by name, if the evaluation has them."""
    prefix = "eval/bits_per_byte_"
    named = [
        f"{key.removeprefix(prefix)} {record[key]:.3f}" for key in record if key.startswith(prefix)
    ]
    return f" ({', '.join(named)})" if named else ""
