"""Weights of Hugging Face or Mistral into a workdir."""

import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mixtral_jax.checkpoint.files.new_folder import make_mark, new_folder, require_room
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.checkpoint.files.zarr_chunks import write_chunks
from mixtral_jax.checkpoint.run_parameters import parameter_key
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.cli.flags import (
    add_process_flags,
    make_verb_parser,
    parse_path,
    read_process_flags,
)
from mixtral_jax.config import MeshConfig
from mixtral_jax.parallel.coordinator import find_scheduler
from mixtral_jax.runs.byte_progress import byte_progress
from mixtral_jax.runs.console import make_console

if TYPE_CHECKING:
    from mixtral_jax.parallel.processes import Processes


def main(arguments: list[str]) -> int:
    """`import --from DIR --to DIR [--dtype D]`."""
    parser = make_verb_parser(__doc__, "import")
    parser.add_argument(
        "--from", dest="source", type=parse_path, required=True, help="a folder with weights"
    )
    parser.add_argument(
        "--to", type=parse_path, required=True, help="the workdir that is made of them"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what to store them in; by default as they are"
    )
    add_process_flags(parser)
    flags = parser.parse_args(arguments)
    weights = open_weights(flags.source)
    if flags.dtype:
        weights = weights.astype(flags.dtype)
    require_room(flags.to, weights.nbytes)
    launch = read_process_flags(flags)
    if launch.coordinator is None and find_scheduler() is None:
        import_weights(weights, flags.to)
        return 0
    from mixtral_jax.parallel.processes import join_processes

    with join_processes(launch) as processes:
        import_weights(weights, flags.to, processes)
    return 0


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
            from mixtral_jax.checkpoint.files.run_writer import adopt_chunks

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
    sys.setswitchinterval(1e-3)

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
    for note in weights.architecture.notes:
        console.print(f"note: {note}")
    console.print(
        f"imported {weights.num_parameters:,} parameters in "
        f"{weights.architecture.model.param_dtype} "
        f"({weights.source}) into {to}: {weights.nbytes / 1e9:.2f} GB in {seconds:.1f} s"
    )


def _write_rest(weights: Weights, folder: Path) -> None:
    # Whoever loads it lays out a mesh of its own.
    config = dataclasses.replace(weights.architecture.config(), mesh=MeshConfig(data=1, expert=1))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if weights.tokenizer is not None:
        weights.tokenizer.save(folder / "tokenizer.model")
