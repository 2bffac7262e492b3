"""Weights of Hugging Face or Mistral into a workdir."""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_jax.checkpoint.new_folder import make_mark, new_folder, require_room
from mixtral_jax.checkpoint.stored import DTYPES
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.cli.byte_progress import byte_progress
from mixtral_jax.cli.flags import add_process_flags, make_verb_parser, parse_path, read_process_flags
from mixtral_jax.config import MeshConfig
from mixtral_jax.train.console import make_console

if TYPE_CHECKING:
    from mixtral_jax.parallel.processes import Processes


def main(arguments: list[str]) -> int:
    """`import --from DIR --to DIR [--dtype D]`."""
    parser = make_verb_parser(__doc__, "import")
    parser.add_argument("--from", dest="source", type=parse_path, required=True, help="a folder with weights")
    parser.add_argument("--to", type=parse_path, required=True, help="the workdir that is made of them")
    parser.add_argument("--dtype", choices=DTYPES, help="what to store them in; by default as they are")
    add_process_flags(parser)
    flags = parser.parse_args(arguments)
    weights = open_weights(flags.source)
    if flags.dtype:
        weights = weights.astype(flags.dtype)
    require_room(flags.to, weights.nbytes)
    # Not before the folder is known to be good: it starts jax.
    from mixtral_jax.parallel.processes import join_processes

    with join_processes(read_process_flags(flags)) as processes:
        import_weights(weights, flags.to, processes)
    return 0


def import_weights(weights: Weights, to: Path, processes: "Processes") -> None:
    """Makes the workdir `to`; each process writes its share of the weights.

    Raises:
        ConfigError: a file that is read is damaged.
        SystemExit: code 1, with a line; a file cannot be written.
    """
    from mixtral_jax.checkpoint.run_writer import save_parameters

    start = time.monotonic()
    is_writer = processes.index == 0
    mark = processes.share("mark", make_mark())[0]
    with (
        new_folder(to, mark, is_writer=is_writer) as folder,
        byte_progress("importing", weights.nbytes // processes.count, is_shown=is_writer) as report,
    ):
        # Returns once all processes have written their share.
        save_parameters(folder / "checkpoints", weights.parameters, {"tokens": 0, "data": ""}, report)
        if is_writer:
            _write_rest(weights, folder)
    console = make_console(is_writer)
    for note in weights.architecture.notes:
        console.print(f"note: {note}")
    seconds = time.monotonic() - start
    console.print(
        f"imported {weights.num_parameters:,} parameters in {weights.architecture.model.param_dtype} "
        f"({weights.source}) into {to}: {weights.nbytes / 1e9:.2f} GB in {seconds:.1f} s"
    )


def _write_rest(weights: Weights, folder: Path) -> None:
    # Whoever loads it lays out a mesh of its own.
    config = dataclasses.replace(weights.architecture.config(), mesh=MeshConfig(data=1, expert=1))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if weights.tokenizer is not None:
        weights.tokenizer.save(folder / "tokenizer.model")
