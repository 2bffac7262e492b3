"""Flags that scripts and verbs share: `--config=CONFIG`, `--config.KEY=VALUE`, `--workdir=RUN`.

Reading them imports nothing heavy, so that help and a wrong flag are answered at once: a verb
imports what it runs after it has read its flags.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixtral_jax.config import (
    SHIPPED,
    Config,
    ConfigError,
    build,
    find_path_problem,
    load_config_file,
    require,
    set_key,
)
from mixtral_jax.parallel.coordinator import Launch
from mixtral_jax.parallel.schedulers import find_scheduler


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The command line of a run; `config` is validated, but its mesh is not yet resolved.

    Attributes:
        named_keys: the keys of the config that the command line sets.
    """

    config: Config
    config_path: Path
    workdir: Path | None
    launch: Launch
    named_keys: Sequence[str]

    def tell_workdir(self, chosen: Path) -> None:
        """Prints how to resume a run whose workdir the command line does not name."""
        if self.workdir is None:
            print(f"this run is in {chosen}: if it is stopped, --workdir={chosen} resumes it")


class FlagParser(argparse.ArgumentParser):
    """Raises `ConfigError` for a wrong flag, and takes no abbreviations."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Called by argparse if flags are wrong."""
        raise ConfigError(f"{message} (--help lists the flags)")


def run_command(command: Callable[[list[str]], int]) -> NoReturn:
    """Exits with what `command(arguments)` returns.

    A `ConfigError` is one line and code 2, Ctrl-C is code 130. If the reader of a pipe has gone, as
    `head` does, nobody is left to tell: code 1 without a word.
    """
    # Tracing makes many objects and few cycles: to look for these after every 700 objects, which is
    # Python's default, takes a fifth of its time.
    gc.set_threshold(100_000, 50, 100)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Names of files may not be UTF-8.
    try:
        code = command(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # Otherwise Python fails again when it flushes what is left to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)


@contextlib.contextmanager
def tell_others(arguments: list[str]) -> Iterator[None]:
    """Wraps the reading of flags. If it fails in one of several processes, the others stop too.

    That process prints the error, and joins the others only to tell them, so that they do not wait
    for it.
    """
    try:
        yield
    except ConfigError as error:
        launch = _find_launch(arguments)
        if launch is None:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        from mixtral_jax.parallel.processes import join_processes

        # If nobody can be told, all that is wrong has been printed.
        with contextlib.suppress(Exception, SystemExit):
            join_processes(launch, code_if_alone=2).refuse(error)
        raise SystemExit(2) from None


def _find_launch(arguments: list[str]) -> Launch | None:
    """How to join other processes; None if this one is alone, or its process flags are wrong."""
    parser = FlagParser(add_help=False)
    add_process_flags(parser)
    try:
        launch = read_process_flags(parser.parse_known_args(arguments)[0])
    except ConfigError:
        return None
    is_alone = find_scheduler() is None if launch.coordinator is None else launch.num_processes == 1
    return None if is_alone else launch


def parse_run_flags(
    arguments: Sequence[str], *, description: str | None, default_config: str
) -> RunFlags:
    """Parses the flags of a script that trains.

    Raises:
        ConfigError: names the flag or the config key, and what would be right.
    """
    parser = make_parser(description, default_config)
    add_run_flags(parser)
    return read_run_flags(*parse_config(parser, arguments), arguments)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir and the flags about processes."""
    parser.add_argument(
        "--workdir",
        type=parse_path,
        help="where everything is written; the same one again resumes",
    )
    add_process_flags(parser)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which processes there are."""
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, where jax cannot find it itself"
    )
    parser.add_argument("--num_processes", type=int, help="the number of processes")
    parser.add_argument(
        "--process_id",
        type=int,
        help="the id of this process, from 0; 0 runs on the coordinator's host",
    )


def read_run_flags(flags: argparse.Namespace, config: Config, arguments: Sequence[str]) -> RunFlags:
    """Reads what `add_run_flags` added.

    Raises:
        ConfigError: the flags about processes do not go together.
    """
    settings = (argument.partition("=")[0] for argument in arguments)
    named = [name.removeprefix("--config.") for name in settings if name.startswith("--config.")]
    return RunFlags(config, flags.config, flags.workdir, read_process_flags(flags), named)


def read_process_flags(flags: argparse.Namespace) -> Launch:
    """Reads what `add_process_flags` added.

    Raises:
        ConfigError: the flags do not go together.
    """
    return Launch(flags.coordinator, flags.num_processes, flags.process_id)


def make_parser(
    description: str | None, default_config: str, verb: str | None = None
) -> argparse.ArgumentParser:
    """A parser that knows --config; its errors are `ConfigError`s."""
    epilog = (
        "--config.KEY=VALUE sets any key, as --config.train.num_steps=100\n"
        "all keys, with their defaults: mixtral_jax/config/; configs to start from: configs/"
    )
    prog = f"mixtral-jax {verb}" if verb else None
    parser = FlagParser(
        prog=prog,
        description=description,
        epilog=epilog,
        # Descriptions are docstrings, whose paragraphs and commands stay as they are.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=parse_path,
        default=SHIPPED / default_config,
        help=f"a .py file with get_config(), or a run's config.json; by default "
        f"configs/{default_config}",
    )
    return parser


def make_verb_parser(description: str | None, verb: str) -> argparse.ArgumentParser:
    """A parser of a verb that takes no config; its errors are `ConfigError`s."""
    return FlagParser(prog=f"mixtral-jax {verb}", description=description)


def parse_path(text: str) -> Path:
    """Parses a flag that names a file or a folder."""
    if problem := find_path_problem(text):
        raise argparse.ArgumentTypeError(f"{text} {problem}".strip())
    return Path(text).expanduser()


def parse_count(text: str) -> int:
    """Parses a flag that is a whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def parse_config(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, Config]:
    """The parser's flags, and the config file with every --config.KEY=VALUE applied in order."""
    flags, rest = parser.parse_known_args(arguments)
    mapping = load_config_file(flags.config)
    set_config_keys(mapping, rest)
    return flags, build(Config, mapping)


def set_config_keys(
    mapping: dict[str, Any], arguments: Sequence[str], prefix: str = "--config."
) -> None:
    """Sets the keys of arguments of the form `PREFIX KEY=VALUE`, as `--config.KEY=VALUE`.

    Raises:
        ConfigError: an argument has another form, or its key is a section.
    """
    for argument in arguments:
        require(
            argument.startswith(prefix),
            f"unknown flag {argument!r}; config keys are set as {prefix}KEY=VALUE",
        )
        _override(mapping, argument, prefix)


def parse_sections(
    parser: argparse.ArgumentParser, arguments: Sequence[str], **sections: type
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The parser's flags, and sections of a config without a config file.

    Each section is a dataclass, built from the arguments `--NAME.KEY=VALUE`.

    Raises:
        ConfigError: names the flag, or the key and its value, and what would be right.
    """
    flags, rest = parser.parse_known_args(arguments)
    mapping: dict[str, Any] = {name: {} for name in sections}
    for argument in rest:
        is_known = any(argument.startswith(f"--{name}.") for name in sections)
        require(is_known, f"unknown flag {argument!r} (--help lists the flags)")
        _override(mapping, argument, "--")
    built = {name: build(cls, mapping[name], f"{name}.") for name, cls in sections.items()}
    return flags, built


def _override(mapping: dict[str, Any], argument: str, prefix: str) -> None:
    """Sets the key of an argument `PREFIX SECTION.KEY=VALUE`."""
    name, equals, value = argument.partition("=")
    require(equals, f"{name} needs a value: {name}=VALUE")
    set_key(mapping, name.removeprefix(prefix), value)
