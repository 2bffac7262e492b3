"""What a block knows about its tokens besides their activations."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ids, positions and segments of tokens, all int32.

    Positions count from the start of a document. Segments number the documents of a row from 1, and
    are 0 at padding.
    """

    ids_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array

    @property
    def is_real_BT(self) -> jax.Array:
        """False at padding, which is neither attended to, routed nor counted."""
        return self.segment_ids_BT > 0
