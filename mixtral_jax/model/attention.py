"""Grouped-query attention with rotary positions."""

import dataclasses

import jax
from flax import nnx

from mixtral_jax.config import AttentionName, ModelConfig
from mixtral_jax.kernels.attention import KeyValues, Past, attend
from mixtral_jax.model.layers import Projection, rotate
from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What attention adds to each token, and the keys and values for later tokens."""

    y_BTD: jax.Array
    key_values: KeyValues


class Attention(nnx.Module):
    """Causal grouped-query attention (arXiv 2305.13245); several documents may share a row."""

    def __init__(
        self, config: ModelConfig, kernel: AttentionName, rules: AxisRules, rngs: nnx.Rngs
    ):
        self.rope_theta = config.rope_theta
        self.kernel: AttentionName = kernel
        self.rules = rules
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        shared = {"config": config, "rules": rules, "rngs": rngs}
        by_head, by_kv_head = ("dense_embed", "heads", None), ("dense_embed", "kv_heads", None)
        self.query = Projection("BTD,DNH->BTNH", (D, N, H), by_head, **shared)
        self.key = Projection("BTD,DKH->BTKH", (D, K, H), by_kv_head, **shared)
        self.value = Projection("BTD,DKH->BTKH", (D, K, H), by_kv_head, **shared)
        self.out = Projection("BTNH,NHD->BTD", (N, H, D), ("heads", None, "dense_embed"), **shared)

    @jax.named_scope("attention")
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
