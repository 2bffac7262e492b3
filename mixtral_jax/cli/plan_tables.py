"""A plan as tables for people."""

from collections.abc import Sequence

from rich.console import Console

from mixtral_jax.plan.estimate import Plan
from mixtral_jax.plan.meshes import describe_mesh
from mixtral_jax.plan.sweep import Attempt
from mixtral_jax.runs.console import in_gib, make_table

# Lighter ones are in --json.
MAX_COLLECTIVES = 12


def print_plan(plan: Plan, console: Console) -> None:
    """Prints everything there is, but for the lightest collectives."""
    step, topology = plan.step, plan.target.topology
    train, mesh = step.config.train, describe_mesh(step.config.mesh)
    part = "" if step.trained == step.parameters else f", {step.trained.total:,} trained"
    console.print(
        f"[bold]{topology.name}[/]: {topology.num_devices} devices as {mesh}; {train.batch_size} "
        "sequences of "
        f"{train.sequence_length:,} tokens per step\n"
        f"{step.parameters.total:,} parameters, {step.parameters.active:,} active{part}"
    )
    if plan.target.is_estimate:
        console.print(
            "[bold yellow]an estimate[/]: compiled on virtual CPU devices, not for "
            f"{topology.chip.name}: memory, "
            "traffic and collectives may differ"
        )
    console.print(f"compiled in {step.seconds:.0f} s, with remat={step.config.model.remat}\n")
    _print_memory(plan, console)
    _print_roofline(plan, console)
    _print_collectives(plan, console)


def print_sweep(attempts: Sequence[Attempt], console: Console) -> None:
    """A line for each attempt, the best first."""
    table = make_table(
        "",
        "mesh",
        ">sequences",
        ">memory",
        "fits",
        ">MFU at most",
        ">tokens/s per device",
        "bound by",
    )
    for attempt in attempts:
        plan, config, roofline = attempt.plan, attempt.plan.step.config, attempt.plan.roofline
        table.add_row(
            str(attempt.rank or "-"),
            describe_mesh(config.mesh),
            str(config.train.batch_size),
            in_gib(plan.step.memory.peak),
            "yes" if plan.fits else "no",
            f"{roofline.mfu_bound:.0%}",
            f"{roofline.tokens_per_second_per_device:,.0f}",
            roofline.bound_by,
        )
    console.print(table)


def _print_memory(plan: Plan, console: Console) -> None:
    memory, hbm = plan.step.memory, plan.hbm_bytes
    table = make_table("of a device", ">memory")
    for name, size in (
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("gradients, activations, buffers", memory.rest),
        ("peak", memory.peak),
        (f"HBM of {plan.target.topology.chip.name}", hbm),
    ):
        table.add_row(name, in_gib(size))
    console.print(table)
    room = in_gib(abs(hbm - memory.peak))
    console.print(
        f"[bold]{'fits' if plan.fits else 'does not fit'}[/], {room} "
        f"{'left' if plan.fits else 'over'}"
    )
    for line in plan.advice:
        console.print(f"  {line}", soft_wrap=True)
    console.print()


def _print_roofline(plan: Plan, console: Console) -> None:
    roofline, chip = plan.roofline, plan.target.topology.chip
    table = make_table("of a step", ">ms", "from")
    each = plan.hardware_flops / plan.target.topology.num_devices
    sent = sum(collective.bytes_per_device for collective in plan.collectives)
    overlap = f", {plan.exposed_bytes / 1e9:,.3f} GB of it not hidden by computation"
    if plan.target.is_estimate:
        overlap = ", over the links of each axis"
    for part, seconds, source in (
        (
            "compute",
            roofline.compute_seconds,
            f"{each / 1e12:,.3f} TFLOP at {chip.flops_per_second / 1e12:,.0f} TFLOP/s",
        ),
        (
            "hbm",
            roofline.hbm_seconds,
            f"{plan.hbm_traffic / 1e9:,.3f} GB at {chip.hbm_bytes_per_second / 1e9:,.0f} GB/s",
        ),
        (
            "interconnect",
            roofline.interconnect_seconds,
            f"{sent / 1e9:,.3f} GB sent{overlap}",
        ),
    ):
        table.add_row(
            part, f"{seconds * 1e3:,.3f}", source, style="bold" if part == roofline.bound_by else ""
        )
    console.print(table)
    console.print(
        f"bound by [bold]{roofline.bound_by}[/]: at most {roofline.mfu_bound:.1%} MFU, "
        f"{roofline.tokens_per_second_per_device:,.0f} tokens/s per device\n"
        f"{plan.model_flops:.4g} FLOPs on all devices that the model needs, "
        f"{plan.hardware_flops:.4g} that are done\n"
    )


def _print_collectives(plan: Plan, console: Console) -> None:
    table = make_table(
        "collective", "over", "pass", ">count", ">MB sent", ">hidden", ">ms", "operand"
    )
    found = list(zip(plan.collectives, plan.collective_seconds, plan.hidden_shares, strict=True))
    for collective, seconds, hidden in found[:MAX_COLLECTIVES]:
        table.add_row(
            collective.op,
            collective.axis or "-",
            collective.pass_,
            str(collective.count),
            f"{collective.bytes_per_device / 1e6:,.3f}",
            "-" if plan.target.is_estimate else f"{hidden:.0%}",
            f"{seconds * 1e3:,.3f}",
            collective.operand,
        )
    console.print(table)
    rest = found[MAX_COLLECTIVES:]
    if rest:
        megabytes = sum(collective.bytes_per_device for collective, *_ in rest) / 1e6
        console.print(
            f"and {len(rest)} lighter kinds, {megabytes:,.3f} MB in all: --json lists them"
        )
