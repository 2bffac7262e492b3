"""Presents a dense model's weights as those of a mixture whose experts are copies of its layer.

Creating the result reads nothing; reading a block of it reads the dense weights.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from mixtral_jax.checkpoint.files.stored import Block, StoredArray
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS

_EXPERTS, _ROUTER = "blocks/moe/experts/", "blocks/moe/router/"


def copy_experts(
    parameters: Mapping[str, StoredArray], num_experts: int, num_slices: int
) -> dict[str, StoredArray]:
    """The parameters of a dense model, with its one expert copied to `num_experts`.

    Expert e has slice e % num_slices of the hidden units, so that experts 0 to num_slices - 1
    together are one whole copy. The result has no router.
    """
    kept = {name: stored for name, stored in parameters.items() if not name.startswith(_ROUTER)}
    experts = {name for name in kept if name.startswith(_EXPERTS)}
    return kept | {
        name: _copies(kept[name], PARAMETERS[name].index("F"), num_experts, num_slices)
        for name in experts
    }


def _copies(dense: StoredArray, hidden: int, num_experts: int, num_slices: int) -> StoredArray:
    """Copies `dense` along dimension 1, of size 1; slices are cut from dimension `hidden`."""
    size = dense.shape[hidden] // num_slices
    shape, chunk = list(dense.shape), list(dense.chunk)
    shape[1], shape[hidden] = num_experts, size
    chunk[1], chunk[hidden] = 1, math.gcd(chunk[hidden], size)
    read = functools.partial(_read_copies, dense, hidden, num_slices, size)
    return dataclasses.replace(dense, shape=tuple(shape), chunk=tuple(chunk), read_into=read)


def _read_copies(
    dense: StoredArray, hidden: int, num_slices: int, size: int, block: Block, target: np.ndarray
) -> None:
    """Reads each slice once, for all experts of the block that have it."""
    experts, units = block[1], block[hidden]
    for expert in range(experts.start, min(experts.start + num_slices, experts.stop)):
        start = expert % num_slices * size
        source = list(block)
        source[1], source[hidden] = slice(0, 1), slice(start + units.start, start + units.stop)
        target[:, expert - experts.start :: num_slices] = dense.read(tuple(source))
