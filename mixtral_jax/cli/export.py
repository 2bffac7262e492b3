"""A checkpoint into a folder that transformers, vLLM or mistral-inference loads."""

import time

from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.cli.flags import make_verb_parser, parse_path


def main(arguments: list[str]) -> int:
    """`export --checkpoint MODEL --to FOLDER [--format=hf|mistral] [--dtype=D]`."""
    parser = make_verb_parser(__doc__, "export")
    parser.add_argument(
        "--checkpoint",
        type=parse_path,
        required=True,
        help="a workdir, a step of it, or any weights",
    )
    parser.add_argument("--to", type=parse_path, required=True, help="the folder to make")
    parser.add_argument(
        "--format", choices=["hf", "mistral"], default="hf", help="by default hf, of Hugging Face"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what to store the weights in; by default as they are"
    )
    flags = parser.parse_args(arguments)

    from mixtral_jax.checkpoint.export import find_lost, require_exportable, write_folder
    from mixtral_jax.checkpoint.files.new_folder import new_folder, require_room
    from mixtral_jax.checkpoint.weights import open_weights
    from mixtral_jax.runs.console import byte_progress

    weights = open_weights(flags.checkpoint)
    if flags.dtype:
        weights = weights.astype(flags.dtype)
    require_exportable(weights, flags.format)  # Fails before anything is written.
    require_room(flags.to, weights.nbytes)
    start = time.monotonic()
    with new_folder(flags.to) as folder, byte_progress("exporting", weights.nbytes) as report:
        write_folder(weights, folder, flags.format, report)
    for line in (*weights.notes, *find_lost(weights, flags.format)):
        print(f"note: {line}")
    print(
        f"exported {weights.num_parameters:,} parameters in "
        f"{weights.architecture.model.param_dtype} ({weights.source}) to {flags.to}: "
        f"{weights.nbytes / 1e9:.2f} GB in {time.monotonic() - start:.1f} s"
    )
    return 0
