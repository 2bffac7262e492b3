"""Trains every arm of an ablation with every seed, and writes a report with pictures."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from mixtral_jax.cli.flags import (
    add_run_flags,
    make_parser,
    read_process_flags,
    set_config_keys,
    tell_others,
)
from mixtral_jax.config import ConfigError, require, run_config_file

if TYPE_CHECKING:
    from mixtral_jax.lab.ablation.definition import Ablation


def main(arguments: list[str]) -> int:
    """`ablate --config=CONFIG --workdir=ABLATION [--arm=ARM[/seed-N] ...] [--report_only]`."""
    parser = make_parser(__doc__, "ablations/balance.py", "ablate")
    add_run_flags(parser)
    _add_flags(parser)
    with tell_others(arguments):
        flags, rest = parser.parse_known_args(arguments)
        ablation = _read(flags, rest)
        chosen = ablation.select(flags.arm) if flags.arm else ablation.runs
        launch = read_process_flags(flags)

    from mixtral_jax.parallel.agreement import ALIKE, require_same
    from mixtral_jax.parallel.processes import join_processes
    from mixtral_jax.runs.ablation import check_saved_arms, report_ablation, run_ablation
    from mixtral_jax.runs.run import choose_workdir
    from mixtral_jax.runs.stop import EXIT_CODES, StopSignal

    with join_processes(launch) as processes, StopSignal(processes) as stop:
        require_same(processes, "ablation", repr(ablation), ALIKE)
        workdir = choose_workdir(flags.workdir, flags.config.stem, processes)
        check_saved_arms(ablation, workdir)
        if not flags.report_only:
            outcome = run_ablation(ablation, chosen, workdir, processes, stop)
            if outcome == "stopped":
                return EXIT_CODES[outcome]
        analyzes_models = not flags.report_only
        if flags.workdir is None and processes.index == 0:
            print(f"this ablation is in {workdir}: --workdir={workdir} resumes it")
        return report_ablation(
            ablation, chosen, workdir, processes, analyzes_models=analyzes_models
        )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arm",
        action="append",
        metavar="ARM",
        help="run only this arm, or run: NAME, NAME/seed-N, or a number from 0, as of a Slurm "
        "array task; repeatable",
    )
    parser.add_argument("--seeds", help="other seeds than the file's, as 0,1,2")
    parser.add_argument(
        "--tokens", type=int, help="train each run on this number of tokens, not the file's"
    )
    parser.add_argument(
        "--report_only", action="store_true", help="train nothing; report what exists"
    )


def _read(flags: argparse.Namespace, rest: list[str]) -> "Ablation":
    """The ablation of the file, with what the command line changes.

    Raises:
        ConfigError: names the arm and the key that are wrong.
    """
    from mixtral_jax.lab.ablation.definition import plan_ablation, read_ablation

    file = run_config_file(flags.config, read_ablation)
    if flags.tokens is not None:
        require(flags.tokens > 0, f"--tokens={flags.tokens} must be over 0")
        file = dataclasses.replace(file, tokens=flags.tokens)
        file.base.get("train", {}).pop("num_steps", None)
    if flags.seeds is not None:
        seeds = flags.seeds.split(",")
        are_numbers = all(seed.isdecimal() for seed in seeds)
        require(are_numbers, f"--seeds={flags.seeds} must be numbers, as 0,1,2")
        file = dataclasses.replace(file, seeds=tuple(map(int, seeds)))
    set_config_keys(file.base, rest)
    try:
        return plan_ablation(file)
    except ConfigError as error:
        raise ConfigError(f"--config={flags.config}: {error}") from None
