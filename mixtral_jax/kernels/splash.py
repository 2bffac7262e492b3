"""Flash attention on TPU: the splash kernel of jax, run on each device's own rows and heads."""

from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

# Positions and head dimensions per tile of the kernel.
_TILE_SIZE = 128
_MAX_BLOCK_SIZE = 512


def find_obstacle(head_dim: int, sequence_length: int, platform: str) -> str:
    """What the kernel needs and does not get here; an empty string if it works."""
    if platform != "tpu":
        return "a TPU"
    if head_dim % _TILE_SIZE:
        return f"model.head_dim={head_dim} to be a multiple of {_TILE_SIZE}"
    if not fits(sequence_length):
        return f"train.sequence_length={sequence_length} to be a multiple of {_TILE_SIZE}"
    return ""


def fits(num_tokens: int) -> bool:
    """True if rows of `num_tokens` tokens are whole tiles."""
    return num_tokens % _TILE_SIZE == 0


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `kernels.attention.attend`, but queries are already scaled, and T is a multiple of 128."""
    T = q_BTNH.shape[1]
    block = max(
        size for size in (_MAX_BLOCK_SIZE, _MAX_BLOCK_SIZE // 2, _TILE_SIZE) if T % size == 0
    )
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def per_device(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
        causal = splash_attention_mask.CausalMask((T, T))
        mask = splash_attention_mask.MultiHeadMask([causal] * q_BTNH.shape[2])
        kernel = splash_attention_kernel.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )

        def attend_row(q_TNH, k_SKH, v_SKH, segment_ids_T):
            segments = splash_attention_kernel.SegmentIds(segment_ids_T, segment_ids_T)
            y_NTH: Any = kernel(*(x.swapaxes(0, 1) for x in (q_TNH, k_SKH, v_SKH)), segments)
            return y_NTH.swapaxes(0, 1)

        return jax.vmap(attend_row)(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)

    # Along mesh axes that the inputs do not name, all devices compute the same result. jax cannot
    # check that through a kernel.
    out_specs = jax.typeof(q_BTNH).sharding.spec
    return jax.shard_map(per_device, out_specs=out_specs, check_vma=False)(
        q_BTNH, k_BSKH, v_BSKH, segment_ids_BT
    )
