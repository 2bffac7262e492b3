"""The balance losses take their stated values, and count real tokens only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model import balance, routing_metrics
from mixtral_jax.model.router import Routes

# As one program each, they compile faster than one operation at a time.
load_balance_loss = jax.jit(balance.load_balance_loss, static_argnums=1)
router_z_loss = jax.jit(balance.router_z_loss)
router_metrics = jax.jit(routing_metrics.router_metrics)


def sums_of(logits, k, real=None):
    """Sums of layers [L, B, T, E] that route by top-k."""
    real = np.ones(logits.shape[1:3], bool) if real is None else real
    return _sum(jnp.asarray(logits, jnp.float32), k, real)


@functools.partial(jax.jit, static_argnums=1)
def _sum(logits, k, real):

    def layer(logits):
        experts = jax.lax.top_k(logits, k)[1]
        chosen = jnp.broadcast_to(real[..., None], experts.shape)
        scores, weights = jax.nn.softmax(logits), jnp.zeros(experts.shape)
        routes = Routes(logits, scores, experts, weights, chosen, chosen)
        return balance.sum_routing(routes, real, jnp.zeros(()))

    return jax.vmap(layer)(logits)


def rotating(E, k, strength=1.0):
    """Tokens that prefer k neighbouring experts, each expert equally often."""
    logits = np.zeros((1, 1, E, E), np.float32)
    for t in range(E):
        logits[0, 0, t, [(t + i) % E for i in range(k)]] = strength
    return logits


@pytest.mark.parametrize(("E", "k"), [(8, 2), (8, 1), (6, 3)])
def test_perfect_balance_is_one_for_switch_and_k_for_hf(E, k):
    sums = sums_of(np.concatenate([rotating(E, k)] * 3), k)
    assert load_balance_loss(sums, "switch") == pytest.approx(1, rel=1e-6)
    assert load_balance_loss(sums, "hf") == pytest.approx(k, rel=1e-6)
    metrics = router_metrics(sums)
    np.testing.assert_allclose(metrics["max_violation"], 0, atol=1e-6)
    np.testing.assert_allclose(metrics["load_entropy"], 1, rtol=1e-6)
    np.testing.assert_array_equal(metrics["dead_experts"], 0)


def test_collapse_to_k_experts_is_e_over_k():
    logits = np.full((2, 1, 16, 8), -50.0, np.float32)
    logits[..., :2] = 50
    sums = sums_of(logits, 2)
    assert load_balance_loss(sums, "switch") == pytest.approx(4, rel=1e-5)
    assert load_balance_loss(sums, "hf") == pytest.approx(8, rel=1e-5)
    np.testing.assert_allclose(router_metrics(sums)["max_violation"], 3, rtol=1e-6)
    np.testing.assert_array_equal(router_metrics(sums)["dead_experts"], 6)


def test_layers_that_lean_opposite_ways_cancel_for_hf_alone():
    logits = np.full((2, 1, 16, 4), -50.0, np.float32)
    logits[0, ..., :2] = 50
    logits[1, ..., 2:] = 50
    sums = sums_of(logits, 2)
    assert load_balance_loss(sums, "hf") == pytest.approx(2, rel=1e-5)
    assert load_balance_loss(sums, "switch") == pytest.approx(
        2, rel=1e-5
    )  # Its balanced value is 1.


def test_masked_tokens_count_for_nothing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 10, 8)).astype(np.float32)
    real = np.arange(10)[None] < np.array([[10], [4], [0]])
    garbage = np.where(real[None, ..., None], logits, 1e3)
    for loss in (
        lambda s: load_balance_loss(s, "switch"),
        lambda s: load_balance_loss(s, "hf"),
        router_z_loss,
    ):
        assert loss(sums_of(logits, 2, real)) == loss(sums_of(garbage, 2, real))


def test_z_loss_is_the_mean_square_of_the_log_partition():
    logits = np.random.default_rng(0).normal(size=(3, 2, 5, 8))
    expected = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    assert router_z_loss(sums_of(logits, 2)) == pytest.approx(expected, rel=1e-5)
