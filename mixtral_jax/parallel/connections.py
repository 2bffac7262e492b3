"""Connects the processes of a run on CPUs, while none of them is busy.

Devices of several processes that meet in a collective connect when they first do so. On CPUs, XLA
(gloo) gives that 30 seconds. A process that still compiles, on a machine that is busy, needs more.
Once they are connected, they wait for each other as long as it takes.
"""

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.parallel.processes import Processes


def connect_processes(mesh: jax.sharding.Mesh, processes: Processes) -> None:
    """Connects the devices along every axis of the mesh, and along every set of axes together."""
    if processes.count == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [
        group
        for num_axes in range(1, len(axes) + 1)
        for group in itertools.combinations(axes, num_axes)
    ]
    with jax.set_mesh(mesh):
        ones = [_make_ones(mesh, group) for group in groups]
        sum_each = jax.jit(lambda arrays: [jnp.sum(array) for array in arrays])
        compiled = sum_each.lower(ones).compile()
        processes.share("connecting", "")
        with _without_stdout():
            sums = jax.block_until_ready(compiled(ones))
    sizes = [math.prod(mesh.shape[axis] for axis in group) for group in groups]
    assert [int(each) for each in sums] == sizes


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Drops what is printed on standard output: gloo prints a line there for each connection."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as output, open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(output.fileno(), 1)


def _make_ones(mesh: jax.sharding.Mesh, group: tuple[str, ...]) -> jax.Array:
    """One number on each device along the axes of `group`, so that their sum is a collective."""
    shape = (math.prod(mesh.shape[axis] for axis in group),)
    sharding = jax.NamedSharding(mesh, jax.P(group))
    return jax.make_array_from_callback(
        shape, sharding, lambda index: np.ones(shape, np.float32)[index]
    )
