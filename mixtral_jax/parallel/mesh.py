"""The mesh of devices: its axes, its sizes, and whether a config fits on it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from mixtral_jax.config import Config, ConfigError, MeshConfig, require

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")


def use_virtual_cpu_devices(count: int) -> None:
    """Splits the CPU into `count` virtual devices; call before jax first touches a device."""
    jax.config.update("jax_num_cpu_devices", count)


def matmul_precision(dtype: str) -> str | None:
    """jax's default precision for a model of `dtype`: float32 means float32, no TF32 and no
    bfloat16 passes.
    """
    return "highest" if dtype == "float32" else None


def resolve_mesh(config: Config, num_devices: int) -> Config:
    """The same config with every mesh axis as a number that fits `num_devices` and the model.

    Raises:
        ConfigError: the axes do not fill the devices, or a dimension does not divide over its axis.
    """
    resolved = dataclasses.replace(
        config, mesh=_fill_mesh(config.mesh, num_devices, config.model.num_experts)
    )
    _check_divisibility(resolved, num_devices)
    return resolved


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The explicit-sharding mesh of a resolved config; axes of size 1 are kept, so specs never
    change.

    `devices` are those of this machine, or of one that is only described.
    """
    devices = jax.devices() if devices is None else devices
    slices = {getattr(device, "slice_index", 0) for device in devices}
    require(
        len(slices) == 1,
        f"the devices are of {len(slices)} TPU slices: a run takes one, whose links join all chips",
    )
    shape = tuple(getattr(config, axis) for axis in MESH_AXES)
    # Not `jax.make_mesh`, which refuses to spread 8 over the torus 4x4x4: 8 takes one of its axes
    # and half of another.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(
        arranged, MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    )


def _fill_mesh(mesh: MeshConfig, num_devices: int, num_experts: int) -> MeshConfig:
    asked = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in asked.values() if size is not None and size != -1)
    left, remainder = divmod(num_devices, fixed)
    described = " x ".join(
        f"{axis}={size}" for axis, size in asked.items() if size not in (None, 1, -1)
    )
    if remainder:
        raise ConfigError(
            f"mesh {described} does not divide {num_devices} devices: {_device_advice(num_devices)}"
        )
    sizes = dict(asked)
    if sizes["expert"] is None:
        sizes["expert"] = math.gcd(num_experts, left)
        left //= sizes["expert"]
    if sizes["data"] is None:
        sizes["data"] = 1 if -1 in sizes.values() else left
    sizes = {axis: left if size == -1 else size for axis, size in sizes.items()}
    total = math.prod(sizes.values())
    require(
        total == num_devices,
        f"mesh {described or 'of size 1'} fills {total} of {num_devices} devices: "
        f"{_device_advice(num_devices)}",
    )
    return dataclasses.replace(mesh, **sizes)


def _device_advice(num_devices: int) -> str:
    return (
        f"the product of the axes must be {num_devices} (set one axis to -1 for the rest, or "
        "change the number "
        "of virtual devices with mesh.cpu_devices)"
    )


def _check_divisibility(config: Config, num_devices: int) -> None:
    mesh, model, train = config.mesh, config.model, config.train
    rules = (
        ("model.num_experts", model.num_experts, "mesh.expert", mesh.expert),
        ("model.num_heads", model.num_heads, "mesh.tensor", mesh.tensor),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("model.intermediate_size", model.intermediate_size, "mesh.tensor", mesh.tensor),
        ("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor),
        (
            "model.hidden_size",
            model.hidden_size,
            "mesh.fsdp x mesh.expert",
            mesh.fsdp * (mesh.expert or 1),
        ),
        (
            "model.hidden_size",
            model.hidden_size,
            "mesh.fsdp x mesh.tensor",
            mesh.fsdp * mesh.tensor,
        ),
        (
            f"a micro-batch (train.batch_size={train.batch_size} / train.gradient_accumulation="
            f"{train.gradient_accumulation})",
            train.micro_batch_size,
            "mesh.data x mesh.fsdp x mesh.expert",
            (mesh.data or 1) * mesh.fsdp * (mesh.expert or 1),
        ),
    )
    for name, value, axis, size in rules:
        if value % (size or 1):
            common = math.gcd(value, num_devices)
            fitting = ", ".join(str(fits) for fits in range(1, common + 1) if common % fits == 0)
            raise ConfigError(
                f"{name}={value} must be a multiple of {axis}={size}: of {num_devices} devices, "
                f"{axis} may take "
                f"{fitting}"
            )
