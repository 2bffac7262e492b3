"""The router: which experts a token visits, and how much each of them counts.

Logits become scores here, and scores become weights. `selection` matches tokens and experts, and
`capacity` limits how many routes an expert takes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.config import BLIND_CHOICES, DispatchConfig, ModelConfig, RouterConfig
from mixtral_jax.model.capacity import fits_capacity
from mixtral_jax.model.layers import Projection
from mixtral_jax.model.noise import add_noise, jitter
from mixtral_jax.model.selection import SELECTORS, Candidates, Selection
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules

# Keeps a sum of weights that may all underflow from dividing by zero.
SMALLEST_SUM = 1e-20


class BalanceBias(nnx.Variable):
    """A bias per expert that follows the load from step to step, without gradients."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """Where the tokens of one layer go, and what that was decided by.

    Routes of padding are neither chosen nor kept. Routes over capacity are chosen but not kept.
    """

    logits_BTE: jax.Array  # float32, before noise
    scores_BTE: jax.Array  # float32, after noise
    experts_BTA: jax.Array  # int32, best first where tokens choose
    weights_BTA: jax.Array  # float32
    is_chosen_BTA: jax.Array  # bool
    is_kept_BTA: jax.Array  # bool


class Router(nnx.Module):
    """Computes `Routes` from activations; by default as Mixtral does (arXiv 2401.04088, 2.1).

    With a `training_key` (see `training_mode`), the router draws noise from it and takes the
    capacity of training. Without one it is deterministic.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.config = router
        self.dispatch = dispatch
        self.rules = rules
        D, E = config.hidden_size, config.num_experts
        self.num_experts = E
        self.gate = Projection(
            "BTD,DE->BTE",
            (D, E),
            (None, None),
            config=config,
            rules=rules,
            rngs=rngs,
            dtype=router.dtype,
            init=nnx.initializers.normal(config.initializer_range * router.init_scale),
        )
        self.bias = BalanceBias(jnp.zeros(E)) if router.bias.update_rate else None
        self.training_key = nnx.data(cast(jax.Array | None, None))

    @jax.named_scope("router")
    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> Routes:
        rows = self.rules.spec("batch", None, None)
        x_BTD = jitter(x_BTD.astype(self.config.dtype), self.config.noise, self.training_key, rows)
        logits_BTE = self.gate(x_BTD, rows).astype(jnp.float32)
        noisy_BTE = add_noise(logits_BTE, self.config.noise, self.training_key, rows)
        is_sigmoid = self.config.score == "sigmoid"
        scores_BTE = jax.nn.sigmoid(noisy_BTE) if is_sigmoid else jax.nn.softmax(noisy_BTE)
        selection = self._select(noisy_BTE, scores_BTE, tokens)
        experts_BTA = selection.experts_BTA
        weights_BTA = self._weigh(noisy_BTE, scores_BTE, experts_BTA)
        is_chosen_BTA = is_kept_BTA = selection.is_chosen_by(tokens.is_real_BT)
        if (factor := self._capacity_factor()) is not None:
            is_kept_BTA &= self._fits(experts_BTA, weights_BTA, tokens.is_real_BT, factor)
        return Routes(logits_BTE, scores_BTE, experts_BTA, weights_BTA, is_chosen_BTA, is_kept_BTA)

    def _select(self, logits_BTE: jax.Array, scores_BTE: jax.Array, tokens: Tokens) -> Selection:
        key = self.training_key
        bias_E = jnp.zeros(self.num_experts) if self.bias is None else self.bias[...]
        salt = jnp.uint32(0) if key is None else jax.random.bits(key, dtype=jnp.uint32)

        def select(logits_BTE, scores_BTE, bias_E, salt, tokens):
            biased_BTE = scores_BTE + bias_E[None, None]
            # Scores are in the order of logits, except where rounding makes ties.
            preference_BTE = logits_BTE if self.bias is None else biased_BTE
            candidates = Candidates(preference_BTE, biased_BTE, tokens, salt, key is not None)
            return SELECTORS[self.config.choice](candidates, self.config)

        logits_BTE, scores_BTE = jax.lax.stop_gradient((logits_BTE, scores_BTE))
        return self._on_each_device(select)(logits_BTE, scores_BTE, bias_E, salt, tokens)

    def _weigh(
        self, logits_BTE: jax.Array, scores_BTE: jax.Array, experts_BTA: jax.Array
    ) -> jax.Array:
        router, A = self.config, experts_BTA.shape[-1]
        if router.choice in BLIND_CHOICES:
            return jnp.full_like(experts_BTA, router.scale / A, jnp.float32)
        if router.score == "softmax_chosen":
            return router.scale * jax.nn.softmax(_pick(logits_BTE, experts_BTA))
        weights_BTA = _pick(scores_BTE, experts_BTA)
        if router.renormalize:
            total_BT1 = jnp.sum(weights_BTA, axis=-1, keepdims=True)
            weights_BTA /= jnp.maximum(total_BT1, SMALLEST_SUM)
        return router.scale * weights_BTA

    def _fits(
        self, experts_BTA: jax.Array, weights_BTA: jax.Array, is_real_BT: jax.Array, factor: float
    ) -> jax.Array:
        """True for routes within the capacity of their expert, [B, T, A]."""

        def fits(experts_BTA, priority_BTA, is_real_BT):
            return fits_capacity(experts_BTA, priority_BTA, is_real_BT, self.num_experts, factor)

        by_weight = self.dispatch.drop == "weight"
        priority_BTA = weights_BTA if by_weight else jnp.zeros_like(weights_BTA)
        priority_BTA = jax.lax.stop_gradient(priority_BTA)
        return self._on_each_device(fits)(experts_BTA, priority_BTA, is_real_BT)

    def _capacity_factor(self) -> float | None:
        if self.training_key is None and self.dispatch.eval_capacity_factor is not None:
            return self.dispatch.eval_capacity_factor
        return self.dispatch.capacity_factor

    def _on_each_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Makes `function` run on each device's own sequences, without communication.

        No sequence depends on another. Outside, every sort and gather would need its sharding.
        """
        return jax.shard_map(function, out_specs=self.rules.spec("batch", None, None))


def _pick(values_BTE: jax.Array, experts_BTA: jax.Array) -> jax.Array:
    """The values of a token's experts, [B, T, A].

    It compares and sums, so that neither it nor its gradient is a gather or a scatter.
    """
    E = values_BTE.shape[-1]
    is_picked_BTAE = experts_BTA[..., None] == jnp.arange(E)[None, None, None]
    return jnp.sum(jnp.where(is_picked_BTAE, values_BTE[:, :, None], 0), axis=-1)
