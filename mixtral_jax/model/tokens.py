"""What a block knows of its tokens besides their activations."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ids, places in their documents, and documents numbered from 1 within a row, 0 at padding; all
    int32.
    """

    ids_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array

    @property
    def is_real_BT(self) -> jax.Array:
        """False at padding, which is neither attended to, routed nor counted."""
        return self.segment_ids_BT > 0
