"""The device mesh: its axes, their sizes, and the check that a config fits on it."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from mixtral_jax.config import Config, ConfigError, MeshConfig, require

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")


# One thread runs a device's program, and one may wait to put another program into its full queue.
# XLA's default, one in all, ends in a deadlock (docs/virtual_devices.md).
_THREADS_PER_VIRTUAL_DEVICE = 2
# Where XLA looks, when jax starts, for a number of threads other than the number of cores.
_NUM_THREADS_VARIABLES = ("PJRT_NPROC", "NPROC")


def use_virtual_cpu_devices(count: int, *, only_compiles: bool = False) -> None:
    """Splits the CPU into `count` virtual devices. Call it before jax first touches a device.

    Args:
        only_compiles: nothing will run on them, so they need no threads.

    Raises:
        ConfigError: jax has started with another number of CPU devices.
    """
    if count > 1 and not only_compiles:
        given = [os.environ.get(name, "") for name in _NUM_THREADS_VARIABLES]
        numbers = [int(number) for number in given if number.isdecimal()]
        wanted = [*numbers, os.cpu_count() or 1, _THREADS_PER_VIRTUAL_DEVICE * count]
        os.environ[_NUM_THREADS_VARIABLES[0]] = str(max(wanted))
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax has started. That does no harm if its devices are those wanted.
        devices = jax.local_devices()
        require(
            devices[0].platform != "cpu" or len(devices) == count,
            f"mesh.cpu_devices={count}: jax has started with {len(devices)} already, and cannot "
            "change that: restart Python, or set mesh.cpu_devices to that number",
        )


def matmul_precision(dtype: str) -> str | None:
    """The default matmul precision of jax for a model of `dtype`.

    A float32 model computes in true float32, without TF32 and without bfloat16 passes.
    """
    return "highest" if dtype == "float32" else None


def resolve_mesh(config: Config, num_devices: int) -> Config:
    """Returns the config with a number for every mesh axis, checked against devices and model.

    Raises:
        ConfigError: the axes do not use all devices, or a dimension of the model or of the batch
            is not a multiple of its axis.
    """
    resolved = dataclasses.replace(
        config, mesh=_fill_mesh(config.mesh, num_devices, config.model.num_experts)
    )
    _check_divisibility(resolved, num_devices)
    return resolved


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The explicit-sharding mesh of a resolved config.

    It has every axis, also those of size 1, so partition specs never depend on the config.

    Args:
        devices: the devices to use, which may belong to a machine that is only described (`plan`).
            By default those of this run.
    """
    devices = jax.devices() if devices is None else devices
    slices = {getattr(device, "slice_index", 0) for device in devices}
    require(
        len(slices) == 1,
        f"the devices belong to {len(slices)} TPU slices, but a run uses only one of them",
    )
    shape = tuple(getattr(config, axis) for axis in MESH_AXES)
    # `jax.make_mesh` cannot place an axis of 8 on a 4x4x4 torus, because it takes one dimension of
    # the torus and half of another.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(
        arranged, MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    )


def _fill_mesh(mesh: MeshConfig, num_devices: int, num_experts: int) -> MeshConfig:
    requested = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in requested.values() if size is not None and size != -1)
    left, remainder = divmod(num_devices, fixed)
    described = " x ".join(
        f"{axis}={size}" for axis, size in requested.items() if size not in (None, 1, -1)
    )
    if remainder:
        raise ConfigError(
            f"mesh {described} does not divide {num_devices} devices: {_device_advice(num_devices)}"
        )
    sizes = dict(requested)
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
        "change the number of virtual devices with mesh.cpu_devices)"
    )


def _check_divisibility(config: Config, num_devices: int) -> None:
    mesh, model, train = config.mesh, config.model, config.train
    data, expert = mesh.data or 1, mesh.expert or 1
    micro_batch = (
        f"a micro-batch (train.batch_size={train.batch_size} / train.gradient_accumulation="
        f"{train.gradient_accumulation})"
    )
    rules = (
        ("model.num_experts", model.num_experts, "mesh.expert", expert),
        ("model.num_heads", model.num_heads, "mesh.tensor", mesh.tensor),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("model.intermediate_size", model.intermediate_size, "mesh.tensor", mesh.tensor),
        ("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor),
        ("model.hidden_size", model.hidden_size, "mesh.fsdp x mesh.expert", mesh.fsdp * expert),
        (
            "model.hidden_size",
            model.hidden_size,
            "mesh.fsdp x mesh.tensor",
            mesh.fsdp * mesh.tensor,
        ),
        (
            micro_batch,
            train.micro_batch_size,
            "mesh.data x mesh.fsdp x mesh.expert",
            data * mesh.fsdp * expert,
        ),
    )
    for name, value, axis, size in rules:
        if value % size:
            common = math.gcd(value, num_devices)
            fitting = ", ".join(str(fits) for fits in range(1, common + 1) if common % fits == 0)
            raise ConfigError(
                f"{name}={value} must be a multiple of {axis}={size}: with {num_devices} devices, "
                f"{axis} may take {fitting}"
            )
