"""The key-value cache: what attention keeps of all tokens so far, in slots of one array a kind.

Rows are padded on the left, so that the last token of every prompt is in the last column and all
rows write their next one into the same slot: an update in place of one slice. Padding at the right
would make it a scatter, each row to a slot of its own, over devices too.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.attention import KeyValues, Past

_SMALLEST = 16
# Beyond it sizes are a quarter of a power of two apart: multiples of the blocks that attention
# works on.
_LAST_POWER = 1024


def bucket(length: int) -> int:
    """The next size, from `length` up, that programs are compiled for: 16, 32, ... 1024, 1536,
    2048, 2560, ...
    """
    power = (
        1 << max(length - 1, 1).bit_length()
    )  # The least power of two that is at least `length`.
    if power <= _LAST_POWER:
        return max(power, _SMALLEST)
    step = max(power // 8, _LAST_POWER // 2)
    return -(-length // step) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, [L, B, S, K, H], sharded as activations: rows over devices,
    heads over `tensor`.

    Slots from `length` on are free; their segment is 0.
    """

    past: Past
    length: jax.Array  # int32, the same for all rows

    @classmethod
    def begin(cls, key_values: KeyValues, segment_ids_BT: jax.Array, num_slots: int) -> "Cache":
        """A cache of `num_slots` slots that holds the first T tokens."""
        T = segment_ids_BT.shape[1]

        def lengthen(x: jax.Array, dimension: int) -> jax.Array:
            widths = [(0, num_slots - T if i == dimension else 0) for i in range(x.ndim)]
            return jnp.pad(x, widths)

        grown = jax.tree.map(lambda x_LBTKH: lengthen(x_LBTKH, 2), key_values)
        return cls(Past(grown, lengthen(segment_ids_BT, 1)), jnp.int32(T))

    def append(self, key_values: KeyValues, segment_ids_BT: jax.Array) -> "Cache":
        """The cache with T more tokens; in place where the old one is given up."""

        def write(old: jax.Array, new: jax.Array, dimension: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, dimension)

        grown = jax.tree.map(lambda old, new: write(old, new, 2), self.past.key_values, key_values)
        segment_ids_BS = write(self.past.segment_ids_BS, segment_ids_BT, 1)
        return Cache(Past(grown, segment_ids_BS), self.length + segment_ids_BT.shape[1])
