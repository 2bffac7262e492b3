"""The router: which experts a token visits, and how much each one counts.

What a token may visit is decided in `choices` and `capacity`; here logits become scores, scores
weights, and all of it sums for `balance`.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.config import BLIND_CHOICES, CHOICES, DispatchConfig, ModelConfig, RouterConfig
from mixtral_jax.model import choices
from mixtral_jax.model.balance import RoutingSums, sum_routing
from mixtral_jax.model.capacity import fits_capacity
from mixtral_jax.model.choices import Candidates
from mixtral_jax.model.layers import Projection
from mixtral_jax.model.noise import add_noise, jitter
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules


class BalanceBias(nnx.Variable):
    """What the balance of loads moves from step to step, where gradients do not reach."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """One layer's decision.

    Padding is not kept, and neither are routes over capacity or those nobody chose.
    """

    logits_BTE: jax.Array  # float32, raw
    experts_BTA: jax.Array  # int32, best first where tokens choose
    weights_BTA: jax.Array  # float32
    is_kept_BTA: jax.Array  # bool
    sums: RoutingSums


class Router(nnx.Module):
    """From activations to a `Routing`, as the config says; Mixtral's (arXiv 2401.04088, section
    2.1) by default.

    `training_key` is there in training alone (`train.step` puts it there): with it come noise and
    the capacity of training.
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

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> Routing:
        rows = self.rules.spec("batch", None, None)
        x_BTD = jitter(x_BTD.astype(self.config.dtype), self.config.noise, self.training_key, rows)
        logits_BTE = self.gate(x_BTD, rows).astype(jnp.float32)
        noisy_BTE = add_noise(logits_BTE, self.config.noise, self.training_key, rows)
        scores_BTE = (
            jax.nn.sigmoid(noisy_BTE)
            if self.config.score == "sigmoid"
            else jax.nn.softmax(noisy_BTE)
        )
        # Per device, since no sequence needs another: gathers and sorts would ask for their
        # sharding.
        decide = jax.shard_map(self._decide, out_specs=(rows, rows, rows))
        chosen = decide(
            *jax.lax.stop_gradient((noisy_BTE, scores_BTE)), *self._bias_and_salt(), tokens
        )
        experts_BTA, is_chosen_BTA, is_kept_BTA = chosen
        weights_BTA = self._weigh(noisy_BTE, scores_BTE, experts_BTA)
        sums = sum_routing(
            logits_BTE, scores_BTE, experts_BTA, is_chosen_BTA, is_kept_BTA, tokens.is_real_BT
        )
        return Routing(logits_BTE, experts_BTA, weights_BTA, is_kept_BTA, sums)

    def _bias_and_salt(self) -> tuple[jax.Array, jax.Array]:
        bias_E = jnp.zeros(self.num_experts) if self.bias is None else self.bias[...]
        key = self.training_key
        return bias_E, jnp.uint32(0) if key is None else jax.random.bits(key, dtype=jnp.uint32)

    def _decide(
        self,
        logits_BTE: jax.Array,
        scores_BTE: jax.Array,
        bias_E: jax.Array,
        salt: jax.Array,
        tokens: Tokens,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Experts, which of them are chosen for real tokens, and which of these fit; each [B, T,
        A].
        """
        biased_BTE = scores_BTE + bias_E[None, None]
        # Scores have the order of logits, but for ties that rounding makes.
        preference_BTE = logits_BTE if self.bias is None else biased_BTE
        candidates = Candidates(
            preference_BTE, biased_BTE, tokens, salt, self.training_key is not None
        )
        chosen = getattr(choices, CHOICES[self.config.choice])(candidates, self.config)
        is_real_BT, experts_BTA = tokens.is_real_BT, chosen.experts_BTA
        is_chosen_BTA = jnp.broadcast_to(is_real_BT[..., None], experts_BTA.shape)
        if chosen.is_chosen_BTA is not None:
            is_chosen_BTA &= chosen.is_chosen_BTA
        if (factor := self._capacity_factor()) is None:
            return experts_BTA, is_chosen_BTA, is_chosen_BTA
        weights_BTA = self._weigh(logits_BTE, scores_BTE, experts_BTA)
        first_BTA = weights_BTA if self.dispatch.drop == "weight" else jnp.zeros_like(weights_BTA)
        fits_BTA = fits_capacity(experts_BTA, first_BTA, is_real_BT, self.num_experts, factor)
        return experts_BTA, is_chosen_BTA, is_chosen_BTA & fits_BTA

    def _capacity_factor(self) -> float | None:
        of_training, of_evaluation = (
            self.dispatch.capacity_factor,
            self.dispatch.eval_capacity_factor,
        )
        return of_training if self.training_key is not None else of_evaluation or of_training

    def _weigh(
        self, logits_BTE: jax.Array, scores_BTE: jax.Array, experts_BTA: jax.Array
    ) -> jax.Array:
        router, shape = self.config, experts_BTA.shape
        if router.choice in BLIND_CHOICES:
            return jnp.full_like(experts_BTA, router.scale / shape[-1], jnp.float32)
        if router.score == "softmax_chosen":
            return router.scale * jax.nn.softmax(_pick(logits_BTE, experts_BTA))
        weights_BTA = _pick(scores_BTE, experts_BTA)
        if router.renormalize:
            weights_BTA /= jnp.maximum(jnp.sum(weights_BTA, axis=-1, keepdims=True), 1e-20)
        return router.scale * weights_BTA


def _pick(values_BTE: jax.Array, experts_BTA: jax.Array) -> jax.Array:
    """The values of the experts.

    Compares and sums: neither it nor its gradient looks anything up.
    """
    E = values_BTE.shape[-1]
    is_picked_BTAE = experts_BTA[..., None] == jnp.arange(E)[None, None, None]
    return jnp.sum(jnp.where(is_picked_BTAE, values_BTE[:, :, None], 0), axis=-1)
