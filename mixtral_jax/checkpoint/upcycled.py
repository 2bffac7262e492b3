"""A dense model's weights seen as those of a mixture of experts, its copies; nothing is read for
it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from mixtral_jax.checkpoint.files.stored import Block, StoredArray
from mixtral_jax.checkpoint.parameters import PARAMETERS

_EXPERTS, _ROUTER = "blocks/moe/experts/", "blocks/moe/router/"


def copy_experts(
    parameters: Mapping[str, StoredArray], num_experts: int, num_slices: int
) -> dict[str, StoredArray]:
    """The parameters of a model of one expert, with `num_experts` in its place and without a
    router.

    Expert e has slice e % num_slices of the hidden units, so that experts 0 to num_slices - 1 are a
    whole copy.
    """
    taken = {name: stored for name, stored in parameters.items() if not name.startswith(_ROUTER)}
    experts = {name for name in taken if name.startswith(_EXPERTS)}
    return taken | {
        name: _copies(taken[name], PARAMETERS[name].index("F"), num_experts, num_slices)
        for name in experts
    }


def _copies(dense: StoredArray, hidden: int, num_experts: int, num_slices: int) -> StoredArray:
    """`dense`, of one expert in dimension 1; slices are cut from dimension `hidden`."""
    size = dense.shape[hidden] // num_slices
    shape, chunk = list(dense.shape), list(dense.chunk)
    shape[1], shape[hidden] = num_experts, size
    chunk[1], chunk[hidden] = 1, math.gcd(chunk[hidden], size)
    read = functools.partial(_read_copies, dense, hidden, num_slices, size)
    return dataclasses.replace(dense, shape=tuple(shape), chunk=tuple(chunk), read_into=read)


def _read_copies(
    dense: StoredArray, hidden: int, num_slices: int, size: int, block: Block, target: np.ndarray
) -> None:
    """Each slice is read once, for all experts of the block that have it."""
    experts, units = block[1], block[hidden]
    for expert in range(experts.start, min(experts.start + num_slices, experts.stop)):
        start = expert % num_slices * size
        source = list(block)
        source[1], source[hidden] = slice(0, 1), slice(start + units.start, start + units.stop)
        target[:, expert - experts.start :: num_slices] = dense.read(tuple(source))
