"""The base of a tuning run: the one that `finetune.base` names, or else a small one, pretrained for
the occasion.
"""

import dataclasses
from pathlib import Path

import jax

from mixtral_jax.cli.flags import RunFlags
from mixtral_jax.runs.base import Base, open_base, open_named_base, plan_base, saved_steps
from mixtral_jax.runs.run import Run, start_run
from mixtral_jax.runs.training import pretrain
from mixtral_jax.runs.workdir import check_saved
from mixtral_jax.config import Config
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.parallel.mesh import resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.train.loop import StopSignal


def find_base(flags: RunFlags, workdir: Path, processes: Processes, stop: StopSignal) -> Base | None:
    """The base of a tuning run in `workdir`, pretrained into `workdir/base` if it must be; None if
    that was stopped.

    Raises:
        ConfigError: the base is no model that can be tuned; or, before anything is pretrained, the
            tuning cannot work.
    """
    config = flags.config
    finetune = config.finetune
    assert finetune is not None
    if finetune.base is not None:
        return open_named_base(config)
    if processes.index == 0:
        # They began with the base that they have.
        for tuned in (workdir, *sorted(workdir.glob("seed-*"))):
            check_saved(tuned, config, "finetune.pretrain.")
    plain = dataclasses.replace(flags, config=plan_base(config, finetune.pretrain), workdir=workdir / "base")
    run = start_run(plain, processes)
    _check_tuning(config, run)
    if run.config.train.num_steps not in saved_steps(run):
        run.console.print(f"finetune.base is not given: pretraining a base into {run.workdir}")
        if pretrain(run, stop) == "stopped":
            return None
    return open_base(run.workdir, config)


def _check_tuning(config: Config, run: Run) -> None:
    """Finds what would else be found minutes later: data that is not there, and parts that no
    pattern matches.
    """
    resolve_mesh(config, run.mesh.size)
    fingerprint_source(config.data.path, config.data.suffixes)
    with jax.set_mesh(run.mesh):
        jax.eval_shape(make_tunable(config, run.mesh.devices.flat[0].platform).make_model)
