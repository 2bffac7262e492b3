"""Weights of other programs into a workdir, written by all processes together.

Starting jax and Orbax takes seconds, so they start while the weights are copied.
"""

import concurrent.futures
import contextlib
import dataclasses
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mixtral_jax.checkpoint.files.new_folder import new_folder
from mixtral_jax.checkpoint.files.zarr_chunks import write_chunks
from mixtral_jax.checkpoint.run_parameters import parameter_key
from mixtral_jax.checkpoint.weights import Weights
from mixtral_jax.config import MeshConfig
from mixtral_jax.runs.console import byte_progress, make_console
from mixtral_jax.whole_files import make_mark, write_json

if TYPE_CHECKING:
    from mixtral_jax.parallel.processes import Processes

# How soon a thread that waits for the interpreter gets its turn while modules are imported.
_SWITCH_INTERVAL_SECONDS = 1e-3


def import_weights(weights: Weights, to: Path, processes: "Processes | None" = None) -> None:
    """Makes the workdir `to`; each of several processes writes its share of the weights.

    Raises:
        ConfigError: a file that is read is damaged.
        SystemExit: code 1, with a line; a file cannot be written.
    """
    start = time.monotonic()
    index, count = (processes.index, processes.count) if processes else (0, 1)
    mark = processes.share("mark", make_mark())[0] if processes else make_mark()
    arrays = {
        parameter_key("trained", parameter): stored
        for parameter, stored in weights.parameters.items()
    }
    with (
        new_folder(to, mark, is_writer=index == 0) as folder,
        byte_progress("importing", weights.nbytes // count, is_shown=index == 0) as report,
    ):
        chunks = folder / "chunks"
        with _copy_in_background(write_chunks(chunks, arrays, index, count), report) as copying:
            # Starts jax and Orbax meanwhile.
            from mixtral_jax.checkpoint.run_from_chunks import adopt_chunks

            def wait() -> None:
                copying.result()
                if processes:
                    processes.share("chunks are written", "")

            adopt_chunks(folder / "checkpoints", arrays, chunks, {"tokens": 0, "data": ""}, wait)
        if index == 0:
            shutil.rmtree(chunks)
            _write_rest(weights, folder)
    _describe(weights, to, time.monotonic() - start, make_console(index == 0))


@contextlib.contextmanager
def _copy_in_background(
    copied: Generator[int], report: Callable[[int], None]
) -> Iterator[concurrent.futures.Future[None]]:
    """Copies while the block runs; `report` is told of the bytes."""
    is_over, interval = threading.Event(), sys.getswitchinterval()
    # Else each thread that has written waits long for its turn while modules are imported.
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)

    def copy() -> None:
        with contextlib.closing(copied):
            for num_bytes in copied:
                report(num_bytes)
                if is_over.is_set():
                    return

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy)
        try:
            yield copying
        finally:
            is_over.set()
            sys.setswitchinterval(interval)


def _describe(weights: Weights, to: Path, seconds: float, console: Console) -> None:
    for note in weights.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"imported {weights.num_parameters:,} parameters in "
        f"{weights.architecture.model.param_dtype} "
        f"({weights.source}) into {to}: {weights.nbytes / 1e9:.2f} GB in {seconds:.1f} s"
    )


def _write_rest(weights: Weights, folder: Path) -> None:
    # Whoever loads it lays out a mesh of its own.
    config = dataclasses.replace(weights.architecture.config(), mesh=MeshConfig(data=1, expert=1))
    write_json(folder / "config.json", dataclasses.asdict(config))
    if weights.tokenizer is not None:
        weights.tokenizer.save(folder / "tokenizer.model")
    weights.side_files.save(folder)
