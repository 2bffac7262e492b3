"""The router: which experts a token visits, and how much each one counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.config import ModelConfig, RouterConfig
from mixtral_jax.model.balance import RoutingSums, sum_routing
from mixtral_jax.model.layers import Projection
from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """One layer's decision. Padding and routes over capacity are chosen, but not kept."""

    logits_BTE: jax.Array  # float32, raw
    experts_BTA: jax.Array  # int32, best first
    weights_BTA: jax.Array  # float32, sum to 1 over A
    is_kept_BTA: jax.Array  # bool
    sums: RoutingSums


class Router(nnx.Module):
    """Top-k token choice, softmax over the chosen (Mixtral, arXiv 2401.04088, section 2.1), in float32."""

    def __init__(
        self, config: ModelConfig, router: RouterConfig, capacity_factor: float | None, rules: AxisRules, rngs: nnx.Rngs
    ):
        self.num_experts_per_token = router.num_experts_per_token
        self.capacity_factor = capacity_factor
        self.rules = rules
        D, E = config.hidden_size, config.num_experts
        self.gate = Projection(
            "BTD,DE->BTE", (D, E), (None, None), config=config, rules=rules, rngs=rngs, dtype="float32"
        )

    def __call__(self, x_BTD: jax.Array, is_real_BT: jax.Array) -> Routing:
        logits_BTE = self.gate(x_BTD.astype(jnp.float32), self.rules.spec("batch", None, None))
        chosen_BTA, experts_BTA = jax.lax.top_k(logits_BTE, self.num_experts_per_token)
        weights_BTA = jax.nn.softmax(chosen_BTA)
        is_kept_BTA = jnp.broadcast_to(is_real_BT[..., None], experts_BTA.shape)
        if self.capacity_factor is not None:
            fits = functools.partial(
                fits_capacity, num_experts=logits_BTE.shape[-1], capacity_factor=self.capacity_factor
            )
            # Per device, since no sequence needs another: gathers and sorts would ask for their sharding.
            per_device = jax.shard_map(fits, out_specs=self.rules.spec("batch", None, None))
            is_kept_BTA &= per_device(experts_BTA, jax.lax.stop_gradient(weights_BTA), is_real_BT)
        sums = sum_routing(logits_BTE, experts_BTA, is_kept_BTA, is_real_BT)
        return Routing(logits_BTE, experts_BTA, weights_BTA, is_kept_BTA, sums)


def fits_capacity(
    experts_BTA: jax.Array,
    weights_BTA: jax.Array,
    is_real_BT: jax.Array,
    num_experts: int,
    capacity_factor: float,
) -> jax.Array:
    """Which routes are within their expert's capacity, [B, T, A] bool.

    An expert takes at most ceil(capacity_factor * k * n / E) routes from a sequence of n real tokens,
    those of highest weight first, ties by position. Decided per sequence, so that neither the mesh
    nor the transport changes what is dropped. Weights are compared to 16 bits after the point: the first
    tokens of the documents of a row are often one token, whose weights would tie but for rounding.
    """
    B, T, A = experts_BTA.shape
    # A table, in float64, less what rounding may add to a product that is whole (1.1 * 2 * 200 / 8 = 55).
    capacity_of_n = np.ceil(capacity_factor * A * np.arange(T + 1) / num_experts - 1e-9).astype(np.int32)
    capacity_B1 = jnp.asarray(capacity_of_n)[jnp.sum(is_real_BT, axis=1, keepdims=True, dtype=jnp.int32)]

    rounded_BTA = jnp.round(weights_BTA * 2**16)

    def rank_in_expert(experts_TA, weights_TA, is_real_T):
        expert_R = jnp.where(is_real_T[:, None], experts_TA, num_experts).reshape(-1)
        index_R = jnp.arange(T * A)
        sorted_R, _, order_R = jax.lax.sort((expert_R, -weights_TA.reshape(-1), index_R), num_keys=2, is_stable=True)
        start_R = jnp.searchsorted(sorted_R, sorted_R, side="left")
        _, rank_R = jax.lax.sort((order_R, index_R - start_R), num_keys=1)
        return rank_R.reshape(T, A)

    rank_BTA = jax.vmap(rank_in_expert)(experts_BTA, rounded_BTA, is_real_BT)
    return rank_BTA < capacity_B1[..., None]
