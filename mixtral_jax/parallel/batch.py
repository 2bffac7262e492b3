"""The batch of one optimizer step, and its layout on the mesh."""

import dataclasses

import jax
import numpy as np
from jax import P

from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, int32 arrays [micro-batches, sequences, tokens]; or one row, [tokens].

    `segment_ids` numbers the documents of a row from 1, and is 0 for padding. `positions` restart
    at 0 in each document. `targets` holds the next token of the same document, and `loss_mask` is 1
    where that target counts in the loss. `text_bytes` has the bytes of text behind each target; it
    is for evaluation alone, and None where the targets themselves tell.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    loss_mask: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    text_bytes: jax.Array | np.ndarray | None = None


def batch_spec(rules: AxisRules) -> P:
    """PartitionSpec of a batch: the sequences of each micro-batch are sharded, the rest is not."""
    return P(None, rules.batch, None)
