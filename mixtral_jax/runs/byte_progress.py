"""How far a copy of weights has come, for people: a bar on standard error, in a terminal only."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextlib.contextmanager
def byte_progress(title: str, num_bytes: int, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives a function that is to be told of bytes as they are done."""
    console = Console(stderr=True, quiet=not is_shown)
    columns = (
        TextColumn(f"[bold]{title}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda done: progress.advance(task, done)
