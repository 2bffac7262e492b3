"""All runs of an ablation: checked, trained one after the other, and shown in a report."""

import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from mixtral_jax.config import ConfigError, require
from mixtral_jax.lab.ablation.definition import Ablation, ArmRun
from mixtral_jax.lab.ablation.records import FAILURE, is_finished
from mixtral_jax.lab.ablation.results import Results, read_results
from mixtral_jax.lab.report.files import write_report
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.ablation_routing import analyze_arms, picture_routing
from mixtral_jax.runs.ablation_run import train_arm
from mixtral_jax.runs.run import platform_of, prepare_devices
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.workdir import changed_since, one_at_a_time
from mixtral_jax.training.assemble import make_training
from mixtral_jax.training.loop import Outcome

_FIXED_KEYS = ("train.num_steps", "data.path", "data.held_out")


def run_ablation(
    ablation: Ablation,
    chosen: Sequence[ArmRun],
    workdir: Path,
    processes: Processes,
    stop: StopSignal,
) -> Outcome:
    """Trains the chosen runs that are not finished; what failed before comes last.

    Raises:
        ConfigError: an arm does not fit the devices, or has no such model; names the arm.
    """
    _check_arms(ablation, processes)
    if processes.index == 0:
        print(_describe(ablation))
    finished = [run.name for run in chosen if is_finished(run, workdir)]
    failed = [run.name for run in chosen if (run.folder(workdir) / FAILURE).exists()]
    finished = processes.share("finished", finished)[0]
    failed = processes.share("failed", failed)[0]
    left = [run for run in chosen if run.name not in finished]
    left.sort(key=lambda run: run.name in failed)
    if finished and processes.index == 0:
        print(
            f"{len(finished)} of {len(chosen)} runs are finished, and not repeated: "
            f"{', '.join(finished)}"
        )
    return _train_all(left, workdir, processes, stop)


def check_saved_arms(ablation: Ablation, workdir: Path) -> None:
    """Makes sure that the runs in the workdir are of this ablation.

    Raises:
        ConfigError: names the first arm that has changed, and its keys.
    """
    for run in ablation.runs:
        # Not even the length may change: steps that are done had the learning rate of another
        # schedule. And runs that are finished do not look at data again.
        folder = run.folder(workdir)
        changed = changed_since(folder, run.config, also_fixed=_FIXED_KEYS)
        require(
            not changed,
            f"arm {run.arm.name}: {folder} was trained with another config; changed: "
            f"{', '.join(changed)}. Use another --workdir, or give the arm another name",
        )


def report_ablation(
    ablation: Ablation,
    chosen: Sequence[ArmRun],
    workdir: Path,
    processes: Processes,
    *,
    analyzes_models: bool,
) -> int:
    """Writes the report; returns the exit code of the whole: 1 if a chosen run has failed.

    The report is written first without what models must be loaded for, so that it is there if that
    fails.
    """
    if processes.index:
        if analyzes_models:
            analyze_arms(ablation, workdir, processes)
        return 0
    # If several tasks end together, the last one in here sees the runs of all.
    with one_at_a_time(workdir / "report"):
        results = read_results(ablation, workdir)
        page = _write_report(results, ablation, workdir)
        if analyzes_models and analyze_arms(ablation, workdir, processes):
            _write_report(results, ablation, workdir)
    _print_status(results)
    print(f"report: {page}")
    return 1 if any(run.name in results.failed for run in chosen) else 0


def _describe(ablation: Ablation) -> str:
    """The question, and how much is trained to answer it."""
    train, arms = ablation.arms[0].config.train, [arm.name for arm in ablation.arms]
    num_tokens = train.num_steps * train.batch_size * train.sequence_length
    return (
        f"{ablation.question}\n{len(arms)} arms ({', '.join(arms)}), {len(ablation.seeds)} seeds "
        f"each: {len(ablation.runs)} runs of {train.num_steps:,} steps, {num_tokens:,} tokens"
    )


def _check_arms(ablation: Ablation, processes: Processes) -> None:
    """Finds now what would be found hours later: an arm that does not fit, or has no such model."""
    prepare_devices(ablation.arms[0].config, processes)
    for arm in ablation.arms:
        try:
            config = resolve_mesh(arm.config, jax.device_count())
            mesh = make_mesh(config.mesh)
            with jax.set_mesh(mesh):
                jax.eval_shape(make_training(config, platform_of(mesh)).make_model)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from None


def _train_all(
    runs: Sequence[ArmRun], workdir: Path, processes: Processes, stop: StopSignal
) -> Outcome:
    started = time.monotonic()
    for number, run in enumerate(runs):
        if processes.index == 0:
            seconds = (time.monotonic() - started) * (len(runs) - number) / max(number, 1)
            left = f", {datetime.timedelta(seconds=round(seconds))} left in all" if number else ""
            print(f"\n--- {run.name}: run {number + 1} of {len(runs)}{left} ---")
        if processes.share(f"{run.name} by now", is_finished(run, workdir))[0]:
            if processes.index == 0:
                print("finished by another process")
            continue
        outcome = train_arm(run.config, run.folder(workdir), processes, stop)
        if outcome == "stopped" or (stop.is_set and run is not runs[-1]):
            return "stopped"
    return "finished"


def _write_report(results: Results, ablation: Ablation, workdir: Path) -> Path:
    pictures = picture_routing(ablation, workdir)
    return write_report(results, workdir / "report", pictures)


def _print_status(results: Results) -> None:
    for result in results.arms:
        loss = result.spreads.get("eval_loss")
        summary = f"held-out loss {loss.mean:.4f}" if loss else "no result"
        print(
            f"{result.arm.name}: {result.status}, {len(result.done)} of {len(result.records)} "
            f"seeds, {summary}"
        )
        for reason in result.reasons:
            print(f"  {reason}", file=sys.stderr if result.status == "failed" else sys.stdout)
