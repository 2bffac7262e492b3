"""Trains every arm of an ablation with every seed, and writes the report: tables and pictures in
report/.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from mixtral_jax.cli.flags import (
    RunFlags,
    add_run_flags,
    make_parser,
    read_process_flags,
    set_config_keys,
)
from mixtral_jax.config import ConfigError, require, run_config_file
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.lab.ablation.plan import Ablation, ArmRun, plan_ablation, read_ablation
from mixtral_jax.lab.ablation.records import FAILURE, is_finished
from mixtral_jax.lab.ablation.results import Results, read_results
from mixtral_jax.lab.report.report import write_report
from mixtral_jax.parallel.agreement import ALIKE, require_same
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.runs.ablation_routing import analyze_arms, picture_routing
from mixtral_jax.runs.ablation_run import train_run
from mixtral_jax.runs.run import choose_workdir, prepare_devices, tell_others
from mixtral_jax.runs.workdir import changed_since, one_at_a_time
from mixtral_jax.train.loop import EXIT_CODES, StopSignal


def main(arguments: list[str]) -> int:
    """`ablate --config=F --workdir=DIR [--arm=ARM[/seed-N] ...] [--report_only] [--config.KEY=VALUE
    ...]`.
    """
    parser = make_parser(__doc__, "ablations/balance.py", "ablate")
    add_run_flags(parser)
    _add_flags(parser)
    with tell_others(arguments):
        flags, rest = parser.parse_known_args(arguments)
        ablation = _read(flags, rest)
        chosen = ablation.select(flags.arm) if flags.arm else ablation.runs
    with join_processes(read_process_flags(flags)) as processes, StopSignal(processes) as stop:
        require_same(processes, "ablation", repr(ablation), ALIKE)
        run_flags = RunFlags(
            chosen[0].config, flags.config, flags.workdir, read_process_flags(flags)
        )
        workdir = choose_workdir(run_flags, processes)
        _check_saved(ablation, workdir)
        if not flags.report_only:
            _check_arms(ablation)
            if processes.index == 0:
                print(_describe(ablation))
        with _compiled_once(processes):
            if (
                not flags.report_only
                and _train(chosen, run_flags, workdir, processes, stop) == "stopped"
            ):
                return EXIT_CODES["stopped"]
            return _report(ablation, chosen, workdir, processes, asks_models=not flags.report_only)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arm",
        action="append",
        metavar="ARM",
        help="run only this arm, or run: NAME, NAME/seed-N, or a number from 0, as of a Slurm array task; repeatable",
    )
    parser.add_argument("--seeds", help="other seeds than the file's, as 0,1,2")
    parser.add_argument(
        "--tokens", type=int, help="train each run on so many tokens instead of the file's"
    )
    parser.add_argument(
        "--report_only", action="store_true", help="train nothing; write the report of what exists"
    )


def _read(flags: argparse.Namespace, rest: list[str]) -> Ablation:
    """The ablation of the file, with what the command line changes.

    Raises:
        ConfigError: names the arm and the key that are wrong.
    """
    file = run_config_file(flags.config, read_ablation)
    if flags.tokens is not None:
        require(flags.tokens > 0, f"--tokens={flags.tokens} must be over 0")
        file = dataclasses.replace(file, tokens=flags.tokens)
        file.base.get("train", {}).pop("num_steps", None)
    if flags.seeds is not None:
        named = flags.seeds.split(",")
        require(
            all(seed.isdecimal() for seed in named),
            f"--seeds={flags.seeds} must be numbers, as 0,1,2",
        )
        file = dataclasses.replace(file, seeds=tuple(map(int, named)))
    set_config_keys(file.base, rest)
    try:
        return plan_ablation(file)
    except ConfigError as error:
        raise ConfigError(f"--config={flags.config}: {error}") from None


def _describe(ablation: Ablation) -> str:
    """The question, and how much is trained for an answer."""
    train, arms = ablation.arms[0].config.train, [arm.name for arm in ablation.arms]
    tokens = train.num_steps * train.batch_size * train.sequence_length
    return (
        f"{ablation.question}\n{len(arms)} arms ({', '.join(arms)}), {len(ablation.seeds)} seeds "
        "each: "
        f"{len(ablation.runs)} runs of {train.num_steps:,} steps, {tokens:,} tokens"
    )


def _check_saved(ablation: Ablation, workdir: Path) -> None:
    """Makes sure that what lies in the workdir is of this ablation.

    Raises:
        ConfigError: names the first arm that has changed, and its keys.
    """
    for run in ablation.runs:
        # Not even the length: the learning rate of the steps that are done would be that of another
        # schedule.
        changed = changed_since(run.folder(workdir), run.config, also_fixed=("train.num_steps",))
        require(
            not changed,
            f"arm {run.arm.name}: {run.folder(workdir)} was trained with another config; changed: "
            f"{', '.join(changed)}. Use another --workdir, or give the arm another name",
        )


def _check_arms(ablation: Ablation) -> None:
    """Finds what would else be found hours later: an arm that does not fit the devices, or has no
    such model.

    Raises:
        ConfigError: names the arm.
    """
    prepare_devices(ablation.arms[0].config)
    for arm in ablation.arms:
        try:
            config = resolve_mesh(arm.config, jax.device_count())
            mesh = make_mesh(config.mesh)
            with jax.set_mesh(mesh):
                jax.eval_shape(make_tunable(config, mesh.devices.flat[0].platform).make_model)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from None


def _train(
    runs: list[ArmRun], flags: RunFlags, workdir: Path, processes: Processes, stop: StopSignal
) -> str:
    """Trains what is not finished; what failed before comes last, so that it keeps nothing else
    waiting.
    """
    finished = processes.share("finished", [run.name for run in runs if is_finished(run, workdir)])[
        0
    ]
    failed = processes.share(
        "failed", [run.name for run in runs if (run.folder(workdir) / FAILURE).exists()]
    )[0]
    left = sorted(
        (run for run in runs if run.name not in finished), key=lambda run: run.name in failed
    )
    say = print if processes.index == 0 else lambda _: None
    if finished:
        say(
            f"{len(finished)} of {len(runs)} runs are finished, and not repeated: "
            f"{', '.join(finished)}"
        )
    started = time.monotonic()
    for number, run in enumerate(left):
        seconds = round((time.monotonic() - started) * (len(left) - number) / max(number, 1))
        time_left = f", {datetime.timedelta(seconds=seconds)} left in all" if number else ""
        say(f"\n--- {run.name}: run {number + 1} of {len(left)}{time_left} ---")
        if processes.share(f"{run.name} by now", is_finished(run, workdir))[0]:
            say("finished by another process")
            continue
        one = dataclasses.replace(flags, config=run.config, workdir=run.folder(workdir))
        if train_run(one, processes, stop) == "stopped" or (stop.is_set and run is not left[-1]):
            return "stopped"
    return "finished"


@contextlib.contextmanager
def _compiled_once(processes: Processes) -> Iterator[None]:
    """Keeps what is compiled within, since seeds of an arm are one program; unless the environment
    says where to.

    Not for longer: another machine may not know this one's instructions. Not with several
    processes, of which jax lets the first alone write, and which must compile alike.
    """
    if processes.count > 1 or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        yield
        return
    shortest = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, shortest)
    with tempfile.TemporaryDirectory(prefix="mixtral_jax-compiled-") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update(shortest, 0.3)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            jax.config.update(shortest, before)
            compilation_cache.reset_cache()


def _report(
    ablation: Ablation,
    chosen: list[ArmRun],
    workdir: Path,
    processes: Processes,
    *,
    asks_models: bool,
) -> int:
    """Writes the report; the exit code of the whole: 1 if a run has failed that was to be trained
    here.

    At first without what models must be asked for: should that fail, all that was measured is
    there.
    """
    if processes.index:
        if asks_models:
            analyze_arms(ablation, workdir, processes)
        return 0
    # Of tasks that end together, the last one to look sees the runs of all.
    with one_at_a_time(workdir / "report"):
        results, page = _write_report(ablation, workdir)
        if asks_models and analyze_arms(ablation, workdir, processes):
            results, page = _write_report(ablation, workdir)
    _say_status(results)
    print(f"report: {page}")
    return 1 if any(run.name in results.failed for run in chosen) else 0


def _write_report(ablation: Ablation, workdir: Path) -> tuple[Results, Path]:
    results = read_results(ablation, workdir)
    return results, write_report(results, workdir / "report", picture_routing(ablation, workdir))


def _say_status(results: Results) -> None:
    for result in results.arms:
        loss = result.spreads.get("eval_loss")
        said = f"held-out loss {loss.mean:.4f}" if loss else "no result"
        print(
            f"{result.arm.name}: {result.status}, {len(result.done)} of {len(result.records)} "
            f"seeds, {said}"
        )
        for reason in result.reasons:
            print(f"  {reason}", file=sys.stderr if result.status == "failed" else sys.stdout)
