"""Tries meshes and batch sizes on one topology, and ranks those that fit."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from mixtral_jax.config import Config, ConfigError, MeshConfig
from mixtral_jax.plan.estimate import Plan, make_plan
from mixtral_jax.plan.meshes import describe_mesh, meshes_that_fit
from mixtral_jax.plan.topology import Target


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A mesh and a batch size that were compiled.

    The best has rank 1; the rank is None if the step does not fit.
    """

    plan: Plan
    rank: int | None


def sweep(
    config: Config,
    target: Target,
    *,
    batch_sizes: Sequence[int],
    limit: int,
    say: Callable[[str], None],
) -> list[Attempt]:
    """Compiles up to `limit` candidates, and ranks them by the bound on tokens per second.

    Those that fit come first. A batch size is skipped if a smaller one did not fit on the mesh.

    Args:
        say: is called with one line about each candidate.

    Raises:
        ConfigError: no mesh fits any of the batch sizes.
    """
    plans: list[Plan] = []
    full: dict[MeshConfig, int] = {}
    for mesh, batch_size in candidates(config, target.topology.num_devices, batch_sizes):
        if len(plans) == limit:
            break
        name = f"{describe_mesh(mesh)}, {batch_size} sequences"
        if batch_size > full.get(mesh, batch_size):
            say(f"{name}: skipped, because {full[mesh]} sequences did not fit")
            continue
        plan = make_plan(_with(config, mesh, batch_size), target)
        plans.append(plan)
        if not plan.fits:
            full[mesh] = batch_size
        roofline = plan.roofline
        say(
            f"{name}: {plan.step.memory.peak / 2**30:.1f} "
            f"GiB{'' if plan.fits else ', does not fit'}; at most "
            f"{roofline.tokens_per_second_per_device:,.0f} tokens/s per device, bound by "
            f"{roofline.bound_by}"
        )
    if not plans:
        sizes, count = ", ".join(map(str, batch_sizes)), target.topology.num_devices
        rows = count * config.train.gradient_accumulation
        raise ConfigError(
            f"no mesh of {count} devices fits batch sizes {sizes}: give multiples of {rows}"
        )
    return _rank(plans)


def candidates(
    config: Config, num_devices: int, batch_sizes: Sequence[int]
) -> Iterator[tuple[MeshConfig, int]]:
    """The meshes and batch sizes to try, the most promising meshes first.

    All batch sizes of a mesh come before the next mesh.
    """
    meshes: dict[MeshConfig, list[int]] = {}
    for batch_size in sorted(batch_sizes):
        for mesh in meshes_that_fit(_with(config, config.mesh, batch_size), num_devices):
            meshes.setdefault(mesh, []).append(batch_size)
    yield from ((mesh, batch_size) for mesh, sizes in meshes.items() for batch_size in sizes)


def _with(config: Config, mesh: MeshConfig, batch_size: int) -> Config:
    return dataclasses.replace(
        config, mesh=mesh, train=dataclasses.replace(config.train, batch_size=batch_size)
    )


def _rank(plans: Sequence[Plan]) -> list[Attempt]:
    fitting = [plan for plan in plans if plan.fits]
    fitting.sort(key=lambda plan: -plan.roofline.tokens_per_second_per_device)
    rest = sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.step.memory.peak)
    return [Attempt(plan, place) for place, plan in enumerate(fitting, 1)] + [
        Attempt(plan, None) for plan in rest
    ]
