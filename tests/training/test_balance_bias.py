"""Balance biases: how they move in a step, and that they even the load without a loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import BalanceBiasConfig
from mixtral_jax.model.balance import next_bias
from mixtral_jax.training.optimizer import bias_rate_schedule
from mixtral_jax.training.state import TrainState
from tests.cases import mesh_of, packed_batch, small_config
from tests.skew import prefer_experts
from tests.training.steps import in_micro_batches, prepare, train

BIAS = {"router__bias__update_rate": 0.01}


def bias_of(state: TrainState) -> np.ndarray:
    return np.asarray(state.frozen.blocks.moe.router.bias[...])


def test_a_bias_moves_once_a_step_by_the_loads_of_the_whole_step() -> None:
    config = small_config(**BIAS)
    batch = packed_batch(config)
    state, metrics = train(config, batch, {})
    load = np.stack([metrics[f"router/layer_{layer:02d}/load"] for layer in range(2)])
    np.testing.assert_allclose(bias_of(state), 0.01 * np.sign(1 / 8 - load), rtol=1e-6)
    assert metrics["router/bias_range"] == pytest.approx(0.02)
    spread, _ = train(config, batch, {"expert": 4, "fsdp": 2})
    np.testing.assert_array_equal(bias_of(spread), bias_of(state))
    without_remat = dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat="none")
    )
    parts, _ = train(*in_micro_batches(without_remat, batch), {})
    np.testing.assert_array_equal(bias_of(parts), bias_of(state))


def test_evaluation_neither_moves_a_bias_nor_draws_noise() -> None:
    config = small_config(**BIAS, router__noise__gumbel=1.0)
    micro = jax.tree.map(lambda rows: rows[0], packed_batch(config))
    bias_LE = np.linspace(-0.1, 0.1, 16, dtype=np.float32).reshape(2, 8)
    with jax.set_mesh(mesh_of()):
        model = jax.jit(prepare(config).training.make_model)()
        model.blocks.moe.router.bias[...] = jnp.asarray(bias_LE)
        forward = jax.jit(
            lambda model: (
                model(micro.tokens, micro.positions, micro.segment_ids).logits_BTV,
                model,
            )
        )
        one, after = forward(model)
        np.testing.assert_array_equal(one, forward(model)[0])
        np.testing.assert_array_equal(after.blocks.moe.router.bias[...], bias_LE)


def test_the_next_bias_is_its_formula() -> None:
    load = np.array([[4.0, 2, 1, 1], [2, 2, 2, 2]], np.float32)
    bias = np.array([[0.1, 0, 0, 0], [0.0, 0, 0, 0.4]], np.float32)
    moved = bias + 0.5 * np.array([[-1, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(next_bias(bias, load, 0.5, is_zero_mean=False), moved)
    centred = moved - moved.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(next_bias(bias, load, 0.5, is_zero_mean=True), centred, atol=1e-7)


def test_the_rate_of_a_bias_falls_to_zero_over_the_last_fraction() -> None:
    rate = bias_rate_schedule(BalanceBiasConfig(update_rate=0.1, decay_fraction=0.2), 100)
    assert [float(rate(step)) for step in (0, 80, 90, 100)] == pytest.approx([0.1, 0.1, 0.05, 0.0])
    assert float(bias_rate_schedule(BalanceBiasConfig(update_rate=0.1), 100)(100)) == pytest.approx(
        0.1
    )


def test_a_bias_evens_the_load_without_a_loss() -> None:
    def prefer_some(state: TrainState) -> TrainState:
        gate = state.trained.blocks.moe.router.gate.weight
        prefer_experts(gate, np.linspace(-0.5, 0.5, 8), state.trained.embedding_VD)
        return state

    def violation(**overrides: Any) -> float:
        kernel = {"dispatch__grouped_matmul": "blocks"}  # Faster for sixty steps.
        config = small_config(router__load_balance__weight=0.0, **kernel, **overrides)
        return train(config, packed_batch(config), {}, 60, prefer_some)[1]["router/max_violation"]

    assert violation(router__bias__update_rate=0.02) < 0.6 * violation()
