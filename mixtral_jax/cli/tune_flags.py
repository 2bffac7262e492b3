"""Flags of the script that tunes: those of any run, and the number of seeds."""

import dataclasses
from collections.abc import Sequence

from mixtral_jax.cli.flags import (
    RunFlags,
    add_run_flags,
    make_parser,
    parse_config,
    parse_count,
    read_run_flags,
)
from mixtral_jax.config import require


@dataclasses.dataclass(frozen=True)
class TuningFlags:
    """The command line of a tuning."""

    run: RunFlags
    num_seeds: int


def parse_tuning_flags(
    arguments: Sequence[str], *, description: str | None, default_config: str
) -> TuningFlags:
    """Parses the flags of a script that tunes.

    Raises:
        ConfigError: names the flag and what would be right.
    """
    parser = make_parser(description, default_config)
    add_run_flags(parser)
    parser.add_argument(
        "--seeds",
        type=parse_count,
        default=1,
        help="tune this number of times, seed after seed; export the best",
    )
    flags, config = parse_config(parser, arguments)
    require(config.finetune is not None, "the config has no section finetune: run train.py with it")
    return TuningFlags(read_run_flags(flags, config, arguments), flags.seeds)
