"""The key-value cache: the keys and values of all tokens so far, one slot per token.

Rows are padded on the left, so the last token of every prompt is in the last column, and all rows
write their next token into the same slot. That is an in-place update of one slice. With padding on
the right, each row would write to its own slot: a scatter, also across devices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.attention import KeyValues, Past

_MIN_BUCKET = 16
# Larger buckets are a quarter of a power of two apart: multiples of the block size of attention.
_MAX_POWER_OF_TWO_BUCKET = 1024


def bucket(length: int) -> int:
    """Rounds a length up to a size that programs are compiled for.

    The sizes are 16, 32, ... 1024, 1536, 2048, 2560, ...
    """
    next_power = 1 << max(length - 1, 1).bit_length()
    if next_power <= _MAX_POWER_OF_TWO_BUCKET:
        return max(next_power, _MIN_BUCKET)
    step = max(next_power // 8, _MAX_POWER_OF_TWO_BUCKET // 2)
    return -(-length // step) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, [L, B, S, K, H].

    They are sharded like activations: rows over devices, heads over `tensor`. Slots from `length`
    on are free, and their segment id is 0.
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
        """The cache with T more tokens. The update is in place if the old cache is donated."""

        def write(old: jax.Array, new: jax.Array, dimension: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, dimension)

        grown = jax.tree.map(lambda old, new: write(old, new, 2), self.past.key_values, key_values)
        segment_ids_BS = write(self.past.segment_ids_BS, segment_ids_BT, 1)
        return Cache(Past(grown, segment_ids_BS), self.length + segment_ids_BT.shape[1])
