"""Starting a run: processes, devices, mesh, workdir; and telling people what has started."""

import dataclasses
import json
import os
import time
from pathlib import Path

import jax
from rich.console import Console

from mixtral_jax.cli.flags import RunFlags
from mixtral_jax.config import Config, ConfigError, require
from mixtral_jax.config_mapping import changed_keys
from mixtral_jax.kernels.attention import choose_attention
from mixtral_jax.kernels.grouped_matmul import choose_kernel
from mixtral_jax.model.dispatch.choose import choose_transport
from mixtral_jax.model.transformer import count_parameters, model_maker
from mixtral_jax.parallel.mesh import (
    MESH_AXES,
    make_mesh,
    matmul_precision,
    resolve_mesh,
    start_processes,
    use_virtual_cpu_devices,
)
from mixtral_jax.train.console import make_console


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has its devices: `config` is resolved, and written in the workdir."""

    config: Config
    mesh: jax.sharding.Mesh
    workdir: Path
    console: Console
    is_writer: bool


def start_run(flags: RunFlags) -> Run:
    """Starts the back end, fits the config to it and opens the workdir.

    Raises:
        ConfigError: the mesh does not fit, or the workdir holds a run of another config.
    """
    start_processes(flags.coordinator, flags.num_processes, flags.process_id)
    config, mesh = start_devices(flags.config)
    is_writer = jax.process_index() == 0
    if flags.workdir is None:
        require(jax.process_count() == 1, "--workdir=DIR is needed with several processes, on storage they all see")
    workdir = flags.workdir or Path("runs") / f"{flags.config_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    _open_workdir(workdir, config, is_writer)
    return Run(config, mesh, workdir, make_console(is_writer), is_writer)


def start_devices(config: Config) -> tuple[Config, jax.sharding.Mesh]:
    """The config with its mesh as numbers, and that mesh. Call before jax first touches a device."""
    use_virtual_cpu_devices(config.mesh.cpu_devices)
    if precision := matmul_precision(config.model.dtype):
        jax.config.update("jax_default_matmul_precision", precision)
    config = resolve_mesh(config, jax.device_count())
    return config, make_mesh(config.mesh)


def describe_run(run: Run) -> None:
    """Says what is about to happen: devices, mesh, who holds which experts, parameters, kernel."""
    config, mesh, say = run.config, run.mesh, run.console.print
    device = mesh.devices.flat[0]
    with jax.set_mesh(mesh):
        count = count_parameters(jax.eval_shape(model_maker(config, device.platform)))
    virtual = " (virtual: one CPU pretends)" if device.platform == "cpu" and mesh.size > 1 else ""
    say(f"[bold]workdir[/]     {run.workdir}")
    say(f"[bold]devices[/]     {mesh.size} x {device.device_kind}{virtual}, {jax.process_count()} process(es)")
    say(f"[bold]mesh[/]        {', '.join(f'{axis}={mesh.shape[axis]}' for axis in MESH_AXES)}")
    for line in describe_experts(mesh, config.model.num_experts):
        say(f"[bold]experts[/]     {line}")
    say(
        f"[bold]parameters[/]  {count.total:,} in all, {count.active:,} active a token "
        f"(top-{config.router.num_experts_per_token} of {config.model.num_experts} experts)"
    )
    say(f"[bold]computes[/]    in {config.model.dtype}")
    say(f"[bold]attention[/]   {choose_attention(config.model, config.train.sequence_length, device.platform)}")
    say(f"[bold]matmul[/]      {choose_kernel(config.dispatch, device.platform)}")
    say(f"[bold]transport[/]   {choose_transport(config, device.platform)}")


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


def _open_workdir(workdir: Path, config: Config, is_writer: bool) -> None:
    """Writes config.json, or checks that this run may continue the one that is there."""
    path = workdir / "config.json"
    # A start that failed before its first checkpoint binds nobody to its config.
    if path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        try:
            saved = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is damaged ({error}): delete it to go on with the config given now") from None
        changed = changed_keys(saved, dataclasses.asdict(config))
        require(
            not changed,
            f"{workdir} holds a run of another config; changed: {', '.join(changed)}. Use another --workdir, or "
            "change only train.num_steps, mesh, dispatch.transport, log, and evaluation, log and checkpoint intervals",
        )
    if is_writer:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f"config.json.{os.getpid()}"
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        temporary.replace(path)
