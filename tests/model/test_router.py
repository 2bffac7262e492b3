"""Every option of the router against its formula in numpy, on a mesh."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import Config
from mixtral_jax.model.balance import RoutingSums
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.selection import SINKHORN_ROUNDS
from mixtral_jax.model.tokens import Tokens
from tests.cases import keep_some, relative_norm
from tests.model.routed_layer import (
    BIAS,
    EXPERT_CHOICE,
    GROUPS,
    NO_LOSS,
    SINKHORN,
    B,
    E,
    T,
    best,
    config_of,
    cotangent,
    inputs,
    run,
    taken_by,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax of the chosen": {},
    "top-1": {"num_experts_per_token": 1},
    "top-3": {"num_experts_per_token": 3},
    "softmax, renormalised": {"score": "softmax"},
    "softmax": {"score": "softmax", "renormalize": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, scaled": {"score": "sigmoid", "renormalize": False, "scale": 2.5},
    "bias": BIAS,
    "sigmoid and bias": {"score": "sigmoid", **BIAS},
    "groups": GROUPS,
    "groups and bias": {**GROUPS, **BIAS},
    "groups of one": {**GROUPS, "num_groups": 8},
    "best two of groups": {**GROUPS, "num_groups": 2, "groups_per_token": 1},
    "sinkhorn": SINKHORN,
    "expert choice": EXPERT_CHOICE,
    "hash": {"choice": "hash", **NO_LOSS},
    "random": {"choice": "random", **NO_LOSS},
    "uniform": {"choice": "uniform", **NO_LOSS},
    "dense": {"choice": "dense", "num_experts_per_token": 8, **NO_LOSS},
}


def hashed(expert: int, *numbers: int) -> float:
    """MurmurHash3's final mix of each number, salted with what came before."""
    mixed = expert
    for number in numbers:
        mixed = (mixed * 0x9E3779B9 + number) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        mixed ^= mixed >> 16
    return (mixed >> 8) / 2**24


def choose(
    config: Config, logits: np.ndarray, scores: np.ndarray, bias: np.ndarray, tokens: Tokens
) -> np.ndarray:
    """Which experts each token takes, bool [B, T, E], by the formula of the choice."""
    router, real = config.router, np.asarray(tokens.segment_ids_BT) > 0
    k, taken = router.num_experts_per_token, np.zeros((B, T, E), bool)
    training_key = jax.random.key(5)  # That of `make_layer`.
    salt = int(jax.random.bits(training_key, dtype=jnp.uint32))
    for b, t in itertools.product(range(B), range(T)):
        value = scores[b, t] + bias
        numbers = [int(tokens.ids_BT[b, t]), int(tokens.positions_BT[b, t])]
        if router.choice in ("hash", "random"):
            salted = numbers[:1] if router.choice == "hash" else [*numbers, salt]
            taken[b, t, best(np.array([hashed(e, *salted) for e in range(E)]), k)] = True
        if router.choice == "group_limited":
            groups = value.reshape(router.num_groups, -1)
            num_best = max(1, k // router.groups_per_token)
            worth = np.sort(groups, axis=1)[:, -num_best:].sum(axis=1)
            closed = np.setdiff1d(
                np.arange(router.num_groups), best(worth, router.groups_per_token)
            )
            groups[closed] = -np.inf
        if router.choice == "uniform":
            taken[b, t, (k * t + np.arange(k)) % E] = True
        elif router.choice == "dense":
            taken[b, t] = True
        elif router.choice in ("top_k", "group_limited"):
            taken[b, t, best(value, k)] = True
    for b in range(B):
        n = int(real[b].sum())
        if router.choice == "expert_choice":
            for e in range(E):
                tokens_of_e = best(
                    np.where(real[b], scores[b, :, e], -1), -(-k * n // E) if n else 0
                )
                taken[b, tokens_of_e, e] = True
        if router.choice == "sinkhorn":
            plan = np.exp(logits[b])
            for _ in range(SINKHORN_ROUNDS if n else 0):
                plan /= plan.sum(axis=1, keepdims=True)
                plan *= n / E / plan[real[b]].sum(axis=0)
            taken[b, np.arange(T)[:, None], best(plan, k)] = True
    return taken & real[..., None]


def weigh(config: Config, logits: jax.Array, scores: jax.Array, taken: np.ndarray) -> jax.Array:
    """Weights [B, T, E], 0 for experts that are not taken."""
    router = config.router
    if router.choice in ("hash", "random", "uniform", "dense"):
        return taken / router.num_experts_per_token
    values = jnp.exp(logits) if router.score == "softmax_chosen" else scores
    values = jnp.where(taken, values, 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    return router.scale * (
        values / jnp.where(total > 0, total, 1) if router.renormalize else values
    )


def scores_of(config: Config, logits: Any) -> Any:
    is_sigmoid = config.router.score == "sigmoid"
    return 1 / (1 + jnp.exp(-logits)) if is_sigmoid else jax.nn.softmax(logits)


# Of a choice with several options, the one that has most of them.
KEPT = (
    "softmax of the chosen",
    "sigmoid, scaled",
    "sigmoid and bias",
    "groups and bias",
    "sinkhorn",
    "expert choice",
    "hash",
    "random",
    "dense",
)


@pytest.mark.parametrize("options", keep_some(OPTIONS, *KEPT))
def test_an_option_is_its_formula_on_a_mesh(options: dict[str, Any]) -> None:
    """Choice, weights, output, sums and gradients, on (expert=4, fsdp=2) in training."""
    config = config_of(options)
    has_bias = bool(config.router.bias.update_rate)
    bias = np.where(np.arange(E) % 3 == 0, 0.2, -0.1).astype(np.float32) * has_bias
    got = run(config, bias, {"expert": 4, "fsdp": 2})
    x, tokens = inputs()
    gate = got.layer.router.gate.weight[...]
    logits = x @ gate
    scores = np.asarray(scores_of(config, logits))
    np.testing.assert_allclose(got.routing.logits_BTE, logits, atol=1e-5)
    taken = taken_by(got.routing)
    np.testing.assert_array_equal(taken, choose(config, logits, scores, bias, tokens))

    def loss(gate, x):
        logits = x @ gate
        weights = weigh(config, logits, scores_of(config, logits), taken)
        y = jnp.sum(each_expert(got.layer, x) * weights[..., None], axis=2)
        return jnp.sum(y * cotangent()), y

    with jax.default_matmul_precision("highest"):
        of_loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, expected), (gate_gradient, x_gradient) = of_loss(gate, jnp.asarray(x))
    assert relative_norm(got.y, expected) < 1e-5
    tolerance = 1e-5 * np.linalg.norm(x_gradient)
    np.testing.assert_allclose(got.gate_gradient, gate_gradient, atol=tolerance)
    assert relative_norm(got.x_gradient, x_gradient) < 1e-5
    check_sums(got.routing.sums, scores, taken, np.asarray(tokens.is_real_BT))


def each_expert(layer: MoE, x: jax.Array) -> jax.Array:
    """The output of every expert for every token, [B, T, E, D]."""
    projections = (layer.experts.gate, layer.experts.up, layer.experts.down)
    gate, up, down = (projection.weight[...] for projection in projections)
    gated, upped = (jnp.einsum("BTD,EDF->BTEF", x, weight) for weight in (gate, up))
    return jnp.einsum("BTEF,EFD->BTED", jax.nn.silu(gated) * upped, down)


def check_sums(
    sums: RoutingSums, scores: np.ndarray, taken: np.ndarray, is_real: np.ndarray
) -> None:
    """Loads, probabilities and the balance within sequences, against loops over arrays."""
    np.testing.assert_array_equal(sums.load_E, taken.sum(axis=(0, 1)))
    probability = scores / scores.sum(axis=-1, keepdims=True)
    probability = np.where(is_real[..., None], probability, 0)
    np.testing.assert_allclose(sums.probability_E, probability.sum(axis=(0, 1)), rtol=1e-5)
    load_B, probability_B = taken.sum(axis=1), probability.sum(axis=1)
    share_B = load_B / np.maximum(load_B.sum(axis=1, keepdims=True), 1)
    assert sums.sequence_balance == pytest.approx((E * share_B * probability_B).sum(), rel=1e-5)


def test_softmax_over_the_chosen_is_the_softmax_of_all_renormalised() -> None:
    one, other = (run(config_of(options)).y for options in ({}, {"score": "softmax"}))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_router_computes_and_begins_as_asked() -> None:
    plain, scaled = (
        run(config_of(options)).layer.router.gate.weight[...]
        for options in ({}, {"init_scale": 0.1})
    )
    np.testing.assert_allclose(scaled, 0.1 * plain, rtol=1e-5)
    exact, coarse = (
        run(config_of(options)).routing.logits_BTE for options in ({}, {"dtype": "bfloat16"})
    )
    assert 1e-4 < relative_norm(coarse, exact) < 2e-2
