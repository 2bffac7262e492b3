"""One run of an ablation: pretraining in a workdir of its own, whose failure ends no other run."""

import sys
import traceback
from pathlib import Path
from typing import Any, Literal

import jax

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.lab.ablation.records import FACTS, FAILURE
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.agreement import find_versions
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.plan.flops import model_flops_per_step
from mixtral_jax.runs.commit import find_commit
from mixtral_jax.runs.pretrain import pretrain
from mixtral_jax.runs.run import Run, start_run
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.workdir import WorkdirInUseError
from mixtral_jax.whole_files import write_json


def train_arm(
    config: Config, workdir: Path, processes: Processes, stop: StopSignal
) -> Literal["finished", "stopped", "failed"]:
    """Trains from wherever the workdir stands; if that fails, writes the reason into it.

    Raises:
        ConfigError: it cannot begin, for a reason that other arms have too, such as missing data.
    """
    try:
        run = start_run(config, workdir, processes)
    except WorkdirInUseError as error:
        if processes.count > 1:
            raise  # The other processes wait for this one.
        print(f"left to the process that trains it: {error}")
        return "finished"
    if run.is_writer:
        (run.workdir / FAILURE).unlink(missing_ok=True)
        write_json(run.workdir / FACTS, collect_facts(run))
    try:
        return pretrain(run, stop)
    except Exception as error:
        if isinstance(error, ConfigError) and not (run.workdir / "metrics.jsonl").exists():
            raise
        if run.is_writer:
            _write_failure(run.workdir, error)
        if processes.count > 1 and not isinstance(error, FloatingPointError):
            raise  # Other processes may not have failed, and wait in a collective.
        return "failed"


def collect_facts(run: Run) -> dict[str, Any]:
    """What the report shows of a run besides its metrics: its model's size, and what ran it."""
    with jax.set_mesh(run.mesh):
        parameters = count_parameters(jax.eval_shape(run.training.make_model))
    device = run.mesh.devices.flat[0]
    return {
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "model_flops_per_step": model_flops_per_step(run.config, parameters, parameters),
        "versions": find_versions(),
        "commit": find_commit(),
        "devices": f"{run.mesh.size} x {device.device_kind}, {jax.process_count()} process(es)",
        "command": ["mixtral-jax", *sys.argv[1:]],
    }


def _write_failure(workdir: Path, error: Exception) -> None:
    first_line, *_ = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {first_line}"
    print(f"failed: {reason}", file=sys.stderr)
    details = "".join(traceback.format_exception(error))
    write_json(workdir / FAILURE, {"reason": reason, "traceback": details})
