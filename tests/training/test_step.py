"""One optimizer step: accumulation, masks, idle experts, decay and schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import OptimizerConfig
from mixtral_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tests.cases import mesh_of, packed_batch, relative_norm, small_config
from tests.skew import prefer_experts
from tests.training.steps import gradients_of, prepare, train


def one_step(config, batch, change=lambda state: state, **sizes):
    """The gradients of a step by name, and its metrics."""
    state, metrics = train(config, batch, sizes, change=change)
    return gradients_of(state), metrics


def test_micro_batches_give_the_gradient_of_one_big_batch():
    router = {"router__load_balance__weight": 0.0, "router__z_loss_weight": 0.1}
    whole = small_config(**router)
    batch = packed_batch(whole)
    split = small_config(train__gradient_accumulation=4, **router)
    micro_batches = jax.tree.map(lambda rows: rows.reshape(4, 2, -1), batch)
    one, metrics_one = one_step(whole, batch, expert=2)
    four, metrics_four = one_step(split, micro_batches, expert=2)
    for name, gradient in one.items():
        assert relative_norm(four[name], gradient) < 1e-5, name
    for name in ("loss", "router_z_loss", "tokens", "router/max_violation"):
        assert metrics_four[name] == pytest.approx(metrics_one[name], rel=1e-5)


@pytest.mark.parametrize("sizes", [{}, pytest.param({"expert": 2}, marks=pytest.mark.meshes)])
def test_the_balance_gradient_keeps_its_weight_under_accumulation(sizes):
    """Four times the same micro-batch is balanced like one of them: same gradient, not a fraction
    of it.
    """
    config = small_config(router__load_balance__weight=10.0, train__batch_size=2)
    batch = packed_batch(config)
    four = small_config(
        router__load_balance__weight=10.0, train__batch_size=8, train__gradient_accumulation=4
    )
    repeated = jax.tree.map(lambda rows: np.repeat(rows, 4, axis=0), batch)
    expected, _ = one_step(config, batch)
    got, _ = one_step(four, repeated, **sizes)
    for name, gradient in expected.items():
        assert relative_norm(got[name], gradient) < 1e-5, name


def prefer_expert_3(state):
    gate = state.trained.blocks.moe.router.gate.weight
    prefer_experts(gate, 30.0 * (np.arange(8) == 3), state.trained.embedding_VD)
    return state


@pytest.mark.parametrize("sizes", [{}, pytest.param({"expert": 8}, marks=pytest.mark.meshes)])
def test_experts_without_a_token_get_exactly_zero_gradient_and_one_may_get_all(sizes):
    config = small_config(router__num_experts_per_token=1)
    gradients, metrics = one_step(config, packed_batch(config), prefer_expert_3, **sizes)
    assert metrics["router/dead_experts"] == 7
    assert np.isfinite(metrics["grad_norm"])
    experts = [gradient for name, gradient in gradients.items() if "experts" in name]
    assert len(experts) == 3
    for gradient_LEXY in experts:
        gradient_LE = np.abs(gradient_LEXY).max(axis=(2, 3))
        assert (gradient_LE[:, 3] > 0).all()
        assert not np.delete(gradient_LE, 3, axis=1).any()


def test_unsupervised_tokens_and_padding_give_no_gradient():
    config = small_config(router__load_balance__weight=0.0, router__z_loss_weight=0.0)
    batch = packed_batch(config)
    garbage = dataclasses.replace(
        batch,
        targets=np.where(batch.loss_mask > 0, batch.targets, 5),
        tokens=np.where(batch.segment_ids > 0, batch.tokens, 5),
    )
    (one, _), (other, _) = (one_step(config, rows) for rows in (batch, garbage))
    for name, gradient in one.items():
        np.testing.assert_array_equal(other[name], gradient, err_msg=name)


def test_decay_falls_on_matrices_only():
    config = small_config()
    with jax.set_mesh(mesh_of()):
        optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), lambda step: 1.0)
        trained = prepare(config).init().trained
        zeros = jax.tree.map(jnp.zeros_like, trained)
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(trained), trained)
    for path, update in jax.tree.flatten_with_path(updates)[0]:
        name = jax.tree_util.keystr(path)
        assert (np.abs(update).max() > 0) == ("scale" not in name), name


def test_the_schedule_is_in_fractions_of_the_run():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_fraction=0.1, final_learning_rate_fraction=0.2
    )
    for num_steps in (20, 1000):
        rate = learning_rate_schedule(config, num_steps)
        assert rate(0) > 0
        assert rate(num_steps // 10 - 1) == pytest.approx(1.0)
        assert rate(num_steps - 1) == pytest.approx(0.2, rel=1e-3)
