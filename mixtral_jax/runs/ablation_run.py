"""One run of an ablation: ordinary pretraining in a workdir of its own, whose failure does not end
the others.
"""

import sys
import traceback
from pathlib import Path
from typing import Any, Literal

import jax

from mixtral_jax.cli.flags import RunFlags
from mixtral_jax.runs.commit import find_commit
from mixtral_jax.runs.run import Run, start_run
from mixtral_jax.runs.training import pretrain
from mixtral_jax.runs.workdir import WorkdirInUseError, write_json
from mixtral_jax.config import ConfigError
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.lab.ablation.records import FACTS, FAILURE
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.agreement import find_versions
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.plan.flops import model_flops_per_step
from mixtral_jax.train.loop import StopSignal


def train_run(flags: RunFlags, processes: Processes, stop: StopSignal) -> Literal["finished", "stopped", "failed"]:
    """Trains from wherever the workdir stands; if that fails, notes the reason in it.

    Raises:
        ConfigError: it cannot begin, for a reason that other arms have too, such as data that are
            not there.
    """
    try:
        run = start_run(flags, processes)
    except WorkdirInUseError as error:
        if processes.count > 1:
            raise  # The others wait for this one.
        print(f"left to the process that is at it: {error}")
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
            _note_failure(run.workdir, error)
        if processes.count > 1 and not isinstance(error, FloatingPointError):
            raise  # The others may know nothing of it, and wait in a collective.
        return "failed"


def collect_facts(run: Run) -> dict[str, Any]:
    """What the report says of a run besides its figures: how large its model is, and what computes
    it.
    """
    tunable = make_tunable(run.config, run.mesh.devices.flat[0].platform)
    with jax.set_mesh(run.mesh):
        parameters = count_parameters(jax.eval_shape(tunable.make_model))
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


def _note_failure(workdir: Path, error: Exception) -> None:
    first, *_ = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {first}"
    print(f"failed: {reason}", file=sys.stderr)
    write_json(workdir / FAILURE, {"reason": reason, "traceback": "".join(traceback.format_exception(error))})
