"""Grouped-query attention with rotary positions."""

import dataclasses
from typing import cast

import jax
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.attention import AttentionKernel, KeyValues, Past, attend
from mixtral_jax.model.layers import Projection, rotate
from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What attention adds to each token, and what later tokens need of it."""

    y_BTD: jax.Array
    key_values: KeyValues


class Attention(nnx.Module):
    """Causal grouped-query attention (arXiv 2305.13245); several documents may share a row."""

    def __init__(self, config: ModelConfig, rules: AxisRules, rngs: nnx.Rngs):
        self.rope_theta = config.rope_theta
        self.kernel: AttentionKernel = cast(AttentionKernel, config.attention)
        self.rules = rules
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        shared = {"config": config, "rules": rules, "rngs": rngs}
        self.query = Projection(
            "BTD,DNH->BTNH", (D, N, H), ("dense_embed", "heads", None), **shared
        )
        self.key = Projection(
            "BTD,DKH->BTKH", (D, K, H), ("dense_embed", "kv_heads", None), **shared
        )
        self.value = Projection(
            "BTD,DKH->BTKH", (D, K, H), ("dense_embed", "kv_heads", None), **shared
        )
        self.out = Projection("BTNH,NHD->BTD", (N, H, D), ("heads", None, "dense_embed"), **shared)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        past: Past | None = None,
    ) -> AttentionOutput:
        by_head = self.rules.spec("batch", None, "act_heads", None)
        q_BTNH = rotate(self.query(x_BTD, by_head), positions_BT, self.rope_theta)
        k_BTKH = rotate(self.key(x_BTD, by_head), positions_BT, self.rope_theta)
        v_BTKH = self.value(x_BTD, by_head)
        y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, self.kernel, past)
        y_BTD = self.out(y_BTNH, self.rules.spec("batch", None, None))
        return AttentionOutput(y_BTD, KeyValues(k_BTKH, v_BTKH))
