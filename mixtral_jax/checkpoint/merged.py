"""Merges adapters into a weight as it is read, a block at a time: W + scaling * A B."""

import dataclasses

import numpy as np

from mixtral_jax.checkpoint.files.stored import Block, StoredArray, shape_of


def merge(base: StoredArray, a: StoredArray, b: StoredArray, scaling: float) -> StoredArray:
    """The weight `base` with an adapter merged into it (arXiv 2106.09685, section 4.1).

    The sum is computed in float32 and rounded once, to the dtype of `base`.

    Args:
        base: [stacked, inputs, outputs], where each stands for one or more dimensions.
        a: [stacked, inputs, r].
        b: [stacked, r, outputs].
    """
    num_stacked = len(a.shape) + len(b.shape) - 2 - len(base.shape)
    num_before_outputs = len(a.shape) - 1
    rank = slice(0, a.shape[-1])

    def read_into(block: Block, target: np.ndarray) -> None:
        stacked, outputs = block[:num_stacked], block[num_before_outputs:]
        low = a.read((*block[:num_before_outputs], rank)).astype(np.float32)
        high = b.read((*stacked, rank, *outputs)).astype(np.float32)
        places = shape_of(stacked)
        product = low.reshape(*places, -1, rank.stop) @ high.reshape(*places, rank.stop, -1)
        target[...] = base.read(block).astype(np.float32) + scaling * product.reshape(target.shape)

    return dataclasses.replace(base, read_into=read_into)
