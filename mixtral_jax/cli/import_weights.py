"""Weights of Hugging Face or Mistral into a workdir."""

from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.cli.flags import (
    add_process_flags,
    make_verb_parser,
    parse_path,
    read_process_flags,
)
from mixtral_jax.parallel.schedulers import find_scheduler


def main(arguments: list[str]) -> int:
    """`import --from MODEL --to RUN [--dtype D]`."""
    parser = make_verb_parser(__doc__, "import")
    parser.add_argument(
        "--from", dest="source", type=parse_path, required=True, help="a folder with weights"
    )
    parser.add_argument("--to", type=parse_path, required=True, help="the workdir to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what to store them in; by default as they are"
    )
    add_process_flags(parser)
    flags = parser.parse_args(arguments)

    from mixtral_jax.checkpoint.files.new_folder import require_room
    from mixtral_jax.checkpoint.weights import open_weights
    from mixtral_jax.runs.import_weights import import_weights

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
