"""What one optimizer step consumes, and how it lies on the mesh."""

import dataclasses

import jax
import numpy as np
from jax import P

from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, int32 arrays [micro-batches, sequences, tokens]; or one row, [tokens].

    `segment_ids` numbers the documents of a row from 1 and is 0 at padding; `positions` restart at
    0 in each; `targets` is the next token of the same document; `loss_mask` is 1 where it counts.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    loss_mask: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray


def batch_spec(rules: AxisRules) -> P:
    """Micro-batches one after the other, the sequences of each over all devices that hold tokens."""
    return P(None, rules.batch, None)
