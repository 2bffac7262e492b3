"""Continues a text with a model."""

from typing import IO

from mixtral_jax.cli.flags import make_verb_parser
from mixtral_jax.cli.model_flags import (
    add_model_flags,
    add_settings_flags,
    note,
    open_model,
    parse_model_flags,
    read_settings,
)
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.generate.generator import Speed
from mixtral_jax.generate.settings import Settings
from mixtral_jax.parallel.processes import join_processes
from mixtral_jax.pretrained import Pretrained


def main(arguments: list[str]) -> int:
    """`generate --checkpoint DIR --prompt TEXT`: the continuation on standard output, the speed on
    standard error.
    """
    parser = make_verb_parser(__doc__, "generate")
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    add_settings_flags(parser, Settings())
    flags, model, _ = parse_model_flags(parser, arguments)
    settings = read_settings(flags)
    with claim_stdout() as output, join_processes(model.launch) as processes:
        loaded = open_model(model, processes)
        write_continuation(loaded, flags.prompt, settings, output if processes.index == 0 else None)
    return 0


def write_continuation(
    loaded: Pretrained, prompt: str, settings: Settings, output: IO[str] | None
) -> None:
    """Writes the continuation as it comes, with a newline behind it only in a terminal.

    `output` is None where another process writes.
    """
    ids, speed, written = loaded.encode(prompt), Speed(), 0
    finish_reason = None
    for (row,) in loaded.generator.stream([ids], settings, speed):
        if output is not None:
            output.write(row.text[written:])
            output.flush()
        written, finish_reason = len(row.text), row.finish_reason
    if output is None:
        return
    if output.isatty():
        output.write("\n")
    note(
        f"{speed} on {loaded.mesh.size} device(s), {loaded.config.model.dtype}; ended: "
        f"{finish_reason}"
    )
    meant_for = loaded.config.train.sequence_length
    if len(ids) + speed.new_tokens + 1 > meant_for:
        note(f"note: the model was made for texts of {meant_for:,} tokens, and this one is longer")
