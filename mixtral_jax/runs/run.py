"""Starting a run: devices, mesh, workdir; and telling people what has started."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from mixtral_jax.cli.flags import FlagParser, RunFlags, add_process_flags, read_process_flags
from mixtral_jax.runs.workdir import NEEDED, open_workdir
from mixtral_jax.config import Config, ConfigError, require
from mixtral_jax.finetune.trained import describe_trained
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.kernels import choose
from mixtral_jax.kernels.choose import Choice
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.agreement import EQUAL, find_unequal_devices, require_agreement, share_devices
from mixtral_jax.parallel.coordinator import Launch, find_scheduler
from mixtral_jax.parallel.mesh import MESH_AXES, make_mesh, matmul_precision, resolve_mesh, use_virtual_cpu_devices
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.runs.console import make_console


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has its devices: `config` is resolved, and written in the workdir."""

    config: Config
    mesh: jax.sharding.Mesh
    workdir: Path
    console: Console
    processes: Processes

    @property
    def is_writer(self) -> bool:
        """Whether this process writes what must be written once."""
        return self.processes.index == 0


@contextlib.contextmanager
def tell_others(arguments: list[str]) -> Iterator[None]:
    """Around what may find the command wrong before the processes join, which would then wait for
    this one in vain.

    One of several processes says so at once, and joins only to end the others with that line.
    """
    try:
        yield
    except ConfigError as error:
        launch = _find_launch(arguments)
        if launch is None:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Nobody to tell; what is wrong is said already.
        with contextlib.suppress(Exception, SystemExit):
            join_processes(launch, code_if_alone=2).refuse(error)
        raise SystemExit(2) from None


def _find_launch(arguments: list[str]) -> Launch | None:
    """How to join others that may wait;

    None where this process is alone, or what the flags say of them is wrong.
    """
    parser = FlagParser(add_help=False)
    add_process_flags(parser)
    try:
        launch = read_process_flags(parser.parse_known_args(arguments)[0])
    except ConfigError:
        return None
    is_alone = find_scheduler() is None if launch.coordinator is None else launch.num_processes == 1
    return None if is_alone else launch


def start_run(flags: RunFlags, processes: Processes) -> Run:
    """Makes sure that the processes agree, starts the back end, fits the config to it and opens the
    workdir.

    Raises:
        ConfigError: the processes differ, the mesh does not fit, or the workdir holds a run of
            another config.
    """
    require_trainable(flags.config)
    require_agreement(processes, flags.config, flags.workdir)
    config, mesh = start_devices(flags.config, processes)
    workdir = choose_workdir(flags, processes)
    open_workdir(workdir, config, processes)
    return Run(config, mesh, workdir, make_console(processes.index == 0), processes)


def require_trainable(config: Config) -> None:
    """Makes sure that parameters are held in numbers that a step can change.

    Raises:
        ConfigError: they are not.
    """
    require(
        config.model.param_dtype != "float16",
        "model.param_dtype=float16 is for weights that are loaded, too coarse to train in: use "
        "float32 or bfloat16",
    )


def choose_workdir(flags: RunFlags, processes: Processes) -> Path:
    """The workdir that the flags name, or else one with the config and the time in its name.

    Raises:
        ConfigError: none is named, and several processes would each choose their own.
    """
    if flags.workdir:
        return flags.workdir
    require(processes.count == 1, NEEDED)
    workdir = Path("runs") / f"{flags.config_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    print(f"this run is in {workdir}: should it be stopped, --workdir={workdir} goes on with it")
    return workdir


def start_devices(config: Config, processes: Processes) -> tuple[Config, jax.sharding.Mesh]:
    """The config with its mesh as numbers, and that mesh. Call before jax first touches a device.

    Raises:
        ConfigError: the processes have unequal devices, or the mesh does not fit them.
    """
    prepare_devices(config)
    require_equal_devices(processes)
    config = resolve_mesh(config, jax.device_count())
    return config, make_mesh(config.mesh)


def require_equal_devices(processes: Processes) -> None:
    """Makes sure that all processes have devices of one kind, and as many.

    Raises:
        ConfigError: names those that differ.
    """
    unequal = find_unequal_devices(share_devices(processes))
    require(not unequal, f"{'; '.join(unequal)}: {EQUAL}")


def prepare_devices(config: Config) -> None:
    """Sets what must be set before jax first touches a device."""
    use_virtual_cpu_devices(config.mesh.cpu_devices)
    if precision := matmul_precision(config.model.dtype):
        jax.config.update("jax_default_matmul_precision", precision)


def describe_run(run: Run) -> None:
    """Says what is about to happen: devices, mesh, who holds which experts, parameters, kernel."""
    config, mesh, say = run.config, run.mesh, run.console.print
    device = mesh.devices.flat[0]
    tunable = make_tunable(config, device.platform)
    with jax.set_mesh(mesh):
        model = jax.eval_shape(tunable.make_model)
    count = count_parameters(model)
    virtual = " (virtual: one CPU pretends)" if device.platform == "cpu" and mesh.size > 1 else ""
    say(f"[bold]workdir[/]     {run.workdir}")
    say(f"[bold]devices[/]     {mesh.size} x {device.device_kind}{virtual}, {jax.process_count()} process(es)")
    say(f"[bold]mesh[/]        {', '.join(f'{axis}={mesh.shape[axis]}' for axis in MESH_AXES)}")
    for line in describe_experts(mesh, config.model.num_experts):
        say(f"[bold]experts[/]     {line}")
    say(f"[bold]parameters[/]  {count.total:,} in all, {count.active:,} active a token ({describe_choice(config)})")
    if config.finetune:
        say(describe_trained(model, tunable.trainable))
    say(f"[bold]computes[/]    in {config.model.dtype}")
    for part, choice in choose_kernels(config, device.platform).items():
        say(f"[bold]{part:<12}[/]{choice}")


def describe_choice(config: Config) -> str:
    """How many experts a token visits, of how many."""
    chosen, shared = config.router.num_experts_per_token, config.model.num_shared_experts
    return f"top-{chosen} of {config.model.num_experts} experts" + (f", and {shared} shared" if shared else "")


def choose_kernels(config: Config, platform: str) -> dict[str, Choice]:
    """What computes and moves what, on the mesh of a resolved config and devices of `platform`; in
    words, and why.

    Raises:
        ConfigError: the one asked for does not work here.
    """
    kernels = choose.choose_kernels(config, platform)
    return {
        "attention": kernels.attention,
        "matmul": kernels.grouped_matmul,
        "transport": kernels.transport,
    }


def describe_experts(mesh: jax.sharding.Mesh, num_experts: int) -> list[str]:
    """Which experts live on which devices, a line for each place on the `expert` axis."""
    places = mesh.shape["expert"]
    share = num_experts // places
    by_place = mesh.devices.swapaxes(0, MESH_AXES.index("expert")).reshape(places, -1)
    lines = []
    for place, devices in enumerate(by_place):
        first, last = place * share, (place + 1) * share - 1
        experts = f"expert {first}" if share == 1 else f"experts {first}-{last}"
        ids = [str(device.id) for device in devices]
        shown = ", ".join(ids[:8]) + (f", ... ({len(ids)} devices)" if len(ids) > 8 else "")
        lines.append(f"{experts} on device {shown}" if len(ids) == 1 else f"{experts} on devices {shown}")
    return lines
