"""Starting a run: processes agree, devices are up, the config fits them, the workdir is open."""

import dataclasses
import time
from pathlib import Path

import jax
import optax
from rich.console import Console

from mixtral_jax.config import Config, require
from mixtral_jax.data.cache import default_cache_dir
from mixtral_jax.parallel.agreement import (
    EQUAL,
    find_unequal_devices,
    require_agreement,
    share_devices,
)
from mixtral_jax.parallel.compilation_cache import keep_compiled_programs
from mixtral_jax.parallel.connections import connect_processes
from mixtral_jax.parallel.memory import device_memory
from mixtral_jax.parallel.mesh import (
    make_mesh,
    matmul_precision,
    resolve_mesh,
    use_virtual_cpu_devices,
)
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.console import make_console
from mixtral_jax.runs.workdir import NEEDED, open_workdir
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.loss import Loss


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose devices are up.

    Attributes:
        config: resolved, its mesh as numbers; `config.json` in the workdir has the same.
        training: how its model is made and trained.
    """

    config: Config
    mesh: jax.sharding.Mesh
    workdir: Path
    console: Console
    processes: Processes
    training: Training

    @property
    def is_writer(self) -> bool:
        """True on the one process that writes what must be written once."""
        return self.processes.index == 0


def start_run(
    config: Config,
    workdir: Path,
    processes: Processes,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None,
) -> Run:
    """Makes sure that the processes agree, starts the devices, and opens the workdir.

    Args:
        optimizer: in place of the config's.
        loss: of the task, in place of that of the next token.

    Raises:
        ConfigError: the processes differ, the mesh does not fit, or the workdir holds a run of
            another config.
    """
    require_trainable(config)
    require_agreement(processes, config, workdir)
    config = start_devices(config, processes)
    mesh = make_mesh(config.mesh)
    memory = device_memory(processes)
    training = make_training(config, platform_of(mesh), memory, optimizer=optimizer, loss=loss)
    open_workdir(workdir, config, processes)
    connect_processes(mesh, processes)
    return Run(config, mesh, workdir, make_console(processes.index == 0), processes, training)


def start_part(run: Run, config: Config, workdir: Path) -> Run:
    """Starts another run on the devices of one: a part of it, in a workdir of its own.

    Raises:
        ConfigError: the config does not fit the devices, or the workdir holds another run.
    """
    config = resolve_mesh(config, run.mesh.size)
    mesh = make_mesh(config.mesh)
    training = make_training(config, platform_of(mesh), device_memory(run.processes))
    open_workdir(workdir, config, run.processes)
    connect_processes(mesh, run.processes)
    return dataclasses.replace(run, config=config, mesh=mesh, workdir=workdir, training=training)


def require_trainable(config: Config) -> None:
    """Makes sure that parameters are held in numbers that a step can change.

    Raises:
        ConfigError: they are not.
    """
    require(
        config.model.param_dtype != "float16",
        "model.param_dtype=float16 is too coarse to train in: use float32 or bfloat16 (float16 is "
        "for weights that are only loaded)",
    )


def choose_workdir(workdir: Path | None, name: str, processes: Processes) -> Path:
    """The workdir that was asked for, or else `runs/NAME-TIME`.

    Raises:
        ConfigError: none was asked for, and several processes would each choose their own.
    """
    if workdir is not None:
        return workdir
    require(processes.count == 1, NEEDED)
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def start_devices(config: Config, processes: Processes) -> Config:
    """Starts the devices, and gives the config with its mesh as numbers.

    Call it before jax first touches a device.

    Raises:
        ConfigError: the processes have unequal devices, or the mesh does not fit them.
    """
    prepare_devices(config, processes)
    require_equal_devices(processes)
    return resolve_mesh(config, jax.device_count())


def require_equal_devices(processes: Processes) -> None:
    """Makes sure that all processes have the same kind and number of devices.

    Raises:
        ConfigError: names those that differ.
    """
    unequal = find_unequal_devices(share_devices(processes))
    require(not unequal, f"{'; '.join(unequal)}: {EQUAL}")


def prepare_devices(config: Config, processes: Processes) -> None:
    """Sets what must be set before jax first touches a device."""
    use_virtual_cpu_devices(config.mesh.cpu_devices)
    keep_programs(processes)
    if precision := matmul_precision(config.model.dtype):
        jax.config.update("jax_default_matmul_precision", precision)


def keep_programs(processes: Processes) -> None:
    """Keeps compiled programs in the cache folder, unless there are several processes.

    Of several, jax would let only the first write to the cache, and all must compile alike.
    """
    if processes.count == 1:
        keep_compiled_programs(default_cache_dir() / "programs")


def platform_of(mesh: jax.sharding.Mesh) -> str:
    """The platform of a mesh's devices: `cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform
