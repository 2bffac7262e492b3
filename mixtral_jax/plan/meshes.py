"""The meshes that a config could use on a number of devices."""

import dataclasses
from collections.abc import Iterator

from mixtral_jax.config import Config, ConfigError, MeshConfig
from mixtral_jax.parallel.mesh import MESH_AXES, resolve_mesh


def meshes_that_fit(config: Config, num_devices: int) -> list[MeshConfig]:
    """All meshes that fit, the most promising first.

    Those are meshes with a small `tensor` axis, then a large `expert`, then a large `fsdp` axis.
    """
    fitting = []
    for sizes in _factors(num_devices):
        mesh = dataclasses.replace(config.mesh, **sizes)
        try:
            resolve_mesh(dataclasses.replace(config, mesh=mesh), num_devices)
        except ConfigError:
            continue
        fitting.append(mesh)
    return sorted(fitting, key=lambda mesh: (mesh.tensor, -(mesh.expert or 1), -mesh.fsdp))


def describe_mesh(mesh: MeshConfig) -> str:
    """The axes larger than 1, such as `fsdp=8 expert=8`."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    return (
        " ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (None, 1))
        or "one device"
    )


def _factors(number: int) -> Iterator[dict[str, int]]:
    for expert in _divisors(number):
        for tensor in _divisors(number // expert):
            for fsdp in _divisors(number // expert // tensor):
                yield {
                    "data": number // expert // tensor // fsdp,
                    "fsdp": fsdp,
                    "expert": expert,
                    "tensor": tensor,
                }


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
