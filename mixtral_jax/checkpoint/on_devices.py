"""Loads stored arrays onto the devices of a mesh.

Each process reads only what its own devices hold, a block at a time, so that host memory holds one
block per device. If a device's part of a parameter is large, it is allocated on the device, and the
blocks are written into it there.
"""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from mixtral_jax.checkpoint.files.stored import (
    NUM_THREADS,
    Block,
    StoredArray,
    blocks_of,
    shift_block,
)
from mixtral_jax.config import require

Model = TypeVar("Model")

# A device's part of a parameter is read at once if it is no larger than this, else in blocks.
MAX_BYTES_AT_ONCE = 2**26


def load_model(parameters: Mapping[str, StoredArray], shapes: Model) -> Model:
    """Loads a model onto the current mesh, with the shapes, dtypes and shardings of `shapes`.

    Args:
        parameters: by name; cast to the dtypes of `shapes`.
        shapes: `jax.eval_shape` of the function that makes the model, called on the same mesh.

    Raises:
        ConfigError: the names or shapes are not those of the model, in which case nothing is
            allocated; or a file turns out to be damaged.
    """
    leaves, structure = jax.tree.flatten_with_path(shapes)
    wanted = {parameter_name(path): leaf for path, leaf in leaves}
    wrong = [f"{name} is missing" for name in wanted if name not in parameters]
    wrong += [f"{name} is unexpected" for name in parameters if name not in wanted]
    for name in wanted.keys() & parameters.keys():
        if parameters[name].shape != wanted[name].shape:
            wrong.append(f"{name} has shape {parameters[name].shape}, not {wanted[name].shape}")
    require(
        not wrong,
        f"the weights do not fit the model: {'; '.join(sorted(wrong))}; use the config that "
        "belongs to the weights",
    )
    mesh = jax.sharding.get_mesh()
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        arrays = []
        for name, leaf in wanted.items():
            stored = parameters[name].astype(leaf.dtype)
            arrays.append(_load(stored, jax.NamedSharding(mesh, leaf.sharding.spec), pool))
    return jax.tree.unflatten(structure, arrays)


def parameter_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter, from the path of its leaf in the model."""
    # The last key of a path is the array in its variable.
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _load(
    stored: StoredArray, sharding: jax.NamedSharding, pool: concurrent.futures.Executor
) -> jax.Array:
    parts = sharding.addressable_devices_indices_map(stored.shape)
    devices = list(parts)
    # Where a device's part begins in each dimension.
    starts = [tuple(part.start or 0 for part in index or ()) for index in parts.values()]
    local = sharding.shard_shape(stored.shape)
    is_small = math.prod(local) * stored.dtype.itemsize <= MAX_BYTES_AT_ONCE
    unit = local if is_small else tuple(map(math.gcd, local, stored.chunk))
    steps = list(blocks_of(local, unit))
    read = _read_ahead(stored, starts, steps, pool)
    if len(steps) == 1:
        shards = [
            jax.device_put(part, device) for part, device in zip(next(read), devices, strict=True)
        ]
    else:
        shards = _assemble(devices, local, stored.dtype, zip(steps, read, strict=True))
    return jax.make_array_from_single_device_arrays(stored.shape, sharding, shards)


def _read_ahead(
    stored: StoredArray,
    starts: Sequence[tuple[int, ...]],
    steps: Sequence[Block],
    pool: concurrent.futures.Executor,
) -> Iterator[list[np.ndarray]]:
    """Yields, for each step, the block of every device's part.

    A block that several devices hold is read once.
    """
    distinct = sorted(set(starts))
    depth = -(-NUM_THREADS // len(distinct))
    pending: collections.deque[dict[tuple[int, ...], concurrent.futures.Future[np.ndarray]]] = (
        collections.deque()
    )
    for number in range(len(steps) + depth):
        if number < len(steps):
            blocks = {start: shift_block(steps[number], start) for start in distinct}
            pending.append(
                {start: pool.submit(stored.read, block) for start, block in blocks.items()}
            )
        if number >= depth:
            ready = {start: future.result() for start, future in pending.popleft().items()}
            yield [ready[start] for start in starts]


def _assemble(
    devices: Sequence[Any],
    shape: tuple[int, ...],
    dtype: np.dtype,
    blocks: Iterable[tuple[Block, list[np.ndarray]]],
) -> list[jax.Array]:
    """Builds an array of `shape` on each device, from blocks at the same place on all devices.

    One program writes to all devices at once: it treats their arrays as one, concatenated.
    """
    mesh = jax.sharding.Mesh(
        np.array(devices), ("device",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    sharding = jax.NamedSharding(mesh, P("device"))

    def concatenate(shards: Sequence[Any]) -> jax.Array:
        on_devices = [
            jax.device_put(shard, device) for shard, device in zip(shards, devices, strict=True)
        ]
        first, *rest = on_devices[0].shape
        return jax.make_array_from_single_device_arrays(
            (first * len(devices), *rest), sharding, on_devices
        )

    with jax.set_mesh(mesh):
        all_shape = (shape[0] * len(devices), *shape[1:])
        whole = jax.jit(functools.partial(jnp.zeros, all_shape, dtype), out_shardings=sharding)()
        for block, parts in blocks:
            start = np.array([part.start for part in block], np.int32)
            whole = _write(whole, concatenate(parts), start, mesh=mesh)
            whole.block_until_ready()  # Keeps blocks from piling up in memory.
    shards = {shard.device: shard.data for shard in whole.addressable_shards}
    return [shards[device] for device in devices]


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def _write(
    whole: jax.Array, part: jax.Array, start: jax.Array, mesh: jax.sharding.Mesh
) -> jax.Array:
    write = jax.shard_map(
        lambda whole, part, start: jax.lax.dynamic_update_slice(
            whole, part, [start[i] for i in range(whole.ndim)]
        ),
        mesh=mesh,
        in_specs=(P("device"), P("device"), P()),
        out_specs=P("device"),
    )
    return write(whole, part, start)
