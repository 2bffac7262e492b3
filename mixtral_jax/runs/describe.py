"""What a run prints first: devices, mesh, who holds which experts, parameters, kernels."""

import jax

from mixtral_jax.config import Config
from mixtral_jax.finetune.trained import describe_trained
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.runs.run import Run

MAX_SHOWN_DEVICES = 8


def describe_run(run: Run) -> None:
    """Prints what is about to happen."""
    config, mesh, say = run.config, run.mesh, run.console.print
    device = mesh.devices.flat[0]
    with jax.set_mesh(mesh):
        model = jax.eval_shape(run.training.make_model)
    count = count_parameters(model)
    is_virtual = device.platform == "cpu" and mesh.size > 1
    virtual = " (virtual: one CPU pretends)" if is_virtual else ""
    axes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in MESH_AXES)
    say(f"[bold]workdir[/]     {run.workdir}")
    say(
        f"[bold]devices[/]     {mesh.size} x {device.device_kind}{virtual}, "
        f"{jax.process_count()} process(es)"
    )
    say(f"[bold]mesh[/]        {axes}")
    for line in describe_experts(mesh, config.model.num_experts):
        say(f"[bold]experts[/]     {line}")
    say(
        f"[bold]parameters[/]  {count.total:,} in all, {count.active:,} active a token "
        f"({describe_experts_per_token(config)})"
    )
    if config.finetune:
        say(describe_trained(model, run.training.trainable))
    say(f"[bold]computes[/]    in {config.model.dtype}")
    kernels = run.training.kernels
    say(f"[bold]attention[/]   {kernels.attention}")
    say(f"[bold]matmul[/]      {kernels.grouped_matmul}")
    say(f"[bold]transport[/]   {kernels.transport}")
    say(f"[bold]remat[/]       {kernels.remat}")


def describe_experts_per_token(config: Config) -> str:
    """How many experts a token visits, of how many."""
    chosen, shared = config.router.num_experts_per_token, config.model.num_shared_experts
    routed = f"top-{chosen} of {config.model.num_experts} experts"
    return routed + (f", and {shared} shared" if shared else "")


def describe_experts(mesh: jax.sharding.Mesh, num_experts: int) -> list[str]:
    """Which experts live on which devices, a line for each place on the `expert` axis."""
    places = mesh.shape["expert"]
    share = num_experts // places
    by_place = mesh.devices.swapaxes(0, MESH_AXES.index("expert")).reshape(places, -1)
    lines = []
    for place, devices in enumerate(by_place):
        first, last = place * share, (place + 1) * share - 1
        experts = f"expert {first}" if share == 1 else f"experts {first}-{last}"
        shown = ", ".join(str(device.id) for device in devices[:MAX_SHOWN_DEVICES])
        if len(devices) > MAX_SHOWN_DEVICES:
            shown += f", ... ({len(devices)} devices)"
        lines.append(f"{experts} on device{'s' if len(devices) > 1 else ''} {shown}")
    return lines
