"""Flags of a run, shared by the scripts and the verbs:

`--config=FILE`, `--config.KEY=VALUE`, `--workdir=DIR`.
"""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixtral_jax.config import (
    SHIPPED,
    Config,
    ConfigError,
    build,
    load_config_file,
    require,
    set_key,
)
from mixtral_jax.parallel.coordinator import Launch


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """What the command line said;

    `config` is validated, but its mesh not yet fitted to the devices.
    """

    config: Config
    config_path: Path
    workdir: Path | None
    launch: Launch


class FlagParser(argparse.ArgumentParser):
    """Answers a wrong flag with a `ConfigError`, and takes no abbreviations."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """What argparse calls when flags are wrong."""
        raise ConfigError(f"{message} (--help lists the flags)")


def run_command(command: Callable[[list[str]], int]) -> NoReturn:
    """Exits with what `command(arguments)` returns; with 2 and one line if the user was wrong, 130
    at Ctrl-C.

    Where the reader of a pipe has gone, as `head` does, nobody is there to be told: 1, without a
    word.
    """
    try:
        code = command(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 1
        )  # Or Python fails once more, at what is left to write.
        code = 1
    sys.exit(code)


def parse_run_flags(
    arguments: Sequence[str], *, description: str | None, default_config: str
) -> RunFlags:
    """The flags of a script that trains."""
    parser = make_parser(description, default_config)
    add_run_flags(parser)
    return read_run_flags(*parse_config(parser, arguments))


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir and what says which processes there are."""
    parser.add_argument(
        "--workdir", type=parse_path, help="where everything is written; the same one again resumes"
    )
    add_process_flags(parser)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what says which processes there are."""
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, where jax cannot find it itself"
    )
    parser.add_argument("--num_processes", type=int, help="how many there are in all")
    parser.add_argument(
        "--process_id", type=int, help="of this process, from 0; 0 runs on the coordinator's host"
    )


def read_run_flags(flags: argparse.Namespace, config: Config) -> RunFlags:
    """What `add_run_flags` parsed.

    Raises:
        ConfigError: the flags about processes do not go together.
    """
    return RunFlags(config, flags.config, flags.workdir, read_process_flags(flags))


def read_process_flags(flags: argparse.Namespace) -> Launch:
    """What `add_process_flags` parsed.

    Raises:
        ConfigError: the flags do not go together.
    """
    return Launch(flags.coordinator, flags.num_processes, flags.process_id)


def make_parser(
    description: str | None, default_config: str, verb: str | None = None
) -> argparse.ArgumentParser:
    """A parser that knows --config, for more flags to be added; its errors are `ConfigError`s."""
    epilog = (
        "--config.KEY=VALUE sets any key, as --config.train.num_steps=100; all keys, with their "
        "defaults: "
        "mixtral_jax/config.py; configs to start from: configs/"
    )
    prog = f"mixtral-jax {verb}" if verb else None
    parser = FlagParser(prog=prog, description=description, epilog=epilog)
    default = SHIPPED / default_config
    parser.add_argument(
        "--config",
        type=parse_path,
        default=default,
        help=f"a .py file with get_config(); by default configs/{default_config}",
    )
    return parser


def make_verb_parser(description: str | None, verb: str) -> argparse.ArgumentParser:
    """A parser of a verb that takes no config; its errors are `ConfigError`s."""
    return FlagParser(prog=f"mixtral-jax {verb}", description=description)


def parse_path(text: str) -> Path:
    """The value of a flag that names a file or a folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: a variable that is not set?")
    return Path(text)


def parse_config(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, Config]:
    """The parser's flags, and the config file with every --config.KEY=VALUE applied in order."""
    flags, rest = parser.parse_known_args(arguments)
    mapping = load_config_file(flags.config)
    set_config_keys(mapping, rest)
    return flags, build(Config, mapping)


def set_config_keys(mapping: dict[str, Any], arguments: Sequence[str]) -> None:
    """Sets what arguments of the form `--config.KEY=VALUE` say.

    Raises:
        ConfigError: one has another form, or its key is a section.
    """
    for argument in arguments:
        require(
            argument.startswith("--config."),
            f"unknown flag {argument!r}; config keys are set as --config.KEY=VALUE",
        )
        _override(mapping, argument, "--config.")


def parse_sections(
    parser: argparse.ArgumentParser, arguments: Sequence[str], **sections: type
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The parser's flags, and some sections of the config without a config: a dataclass each, from
    `--NAME.KEY=VALUE`.

    Raises:
        ConfigError: names the flag, or the key and its value, and what would be right.
    """
    flags, rest = parser.parse_known_args(arguments)
    mapping: dict[str, Any] = {name: {} for name in sections}
    for argument in rest:
        is_known = any(argument.startswith(f"--{name}.") for name in sections)
        require(is_known, f"unknown flag {argument!r} (--help lists the flags)")
        _override(mapping, argument, "--")
    return flags, {
        name: build(section, mapping[name], f"{name}.") for name, section in sections.items()
    }


def _override(mapping: dict[str, Any], argument: str, prefix: str) -> None:
    """Sets what `SECTION.KEY=VALUE`, behind the prefix, says."""
    name, equals, value = argument.partition("=")
    require(equals, f"{name} needs a value: {name}=VALUE")
    set_key(mapping, name.removeprefix(prefix), value)
