"""Continues a text with a model."""

from typing import IO, TYPE_CHECKING

from mixtral_jax.cli.flags import make_verb_parser
from mixtral_jax.cli.model_flags import (
    add_model_flags,
    add_settings_flags,
    open_model,
    parse_model_flags,
    read_settings,
)
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.generate.settings import Settings

if TYPE_CHECKING:
    from mixtral_jax.pretrained import Pretrained


def main(arguments: list[str]) -> int:
    """`generate --checkpoint MODEL --prompt PROMPT`: the continuation alone on standard output."""
    parser = make_verb_parser(__doc__, "generate")
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    add_settings_flags(parser, Settings())
    flags, model, _ = parse_model_flags(parser, arguments)
    settings = read_settings(flags)

    from mixtral_jax.parallel.processes import join_processes

    with claim_stdout() as output, join_processes(model.launch) as processes:
        loaded = open_model(model, processes)
        is_writer = processes.index == 0
        write_continuation(loaded, flags.prompt, settings, output if is_writer else None)
    return 0


def write_continuation(
    loaded: "Pretrained", prompt: str, settings: Settings, output: IO[str] | None
) -> None:
    """Writes the continuation as it comes; in a terminal, a newline follows it.

    Args:
        output: None on processes that write nothing.
    """
    from mixtral_jax.generate.generator import Speed
    from mixtral_jax.runs.console import note

    ids, speed, num_written = loaded.encode(prompt), Speed(), 0
    finish_reason = None
    for (row,) in loaded.generator.stream([ids], settings, speed):
        if output is not None:
            output.write(row.text[num_written:])
            output.flush()
        num_written, finish_reason = len(row.text), row.finish_reason
    if output is None:
        return
    if output.isatty():
        output.write("\n")
    note(
        f"{speed} on {loaded.mesh.size} device(s), {loaded.config.model.dtype}; "
        f"ended: {finish_reason}"
    )
    context_length = loaded.config.train.sequence_length
    if len(ids) + speed.new_tokens + 1 > context_length:
        note(
            f"note: the model was made for texts of {context_length:,} tokens, and this one is "
            "longer"
        )
