"""Router options over whole steps: biases, scopes of balance, noise, masks, what is frozen, and the
metrics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixtral_jax.config import BalanceBiasConfig, Config
from mixtral_jax.model.balance import next_bias
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.optimizer import (
    bias_rate_schedule,
    learning_rate_schedule,
    make_optimizer,
)
from mixtral_jax.training.state import TrainState, init_state
from mixtral_jax.training.step import TrainStep, make_train_step
from tests.cases import mesh_of, on_mesh, packed_batch, relative_norm, small_config
from tests.skew import prefer_experts
from tests.training.test_mesh_invariance import remember_gradients

SPREAD = {"expert": 4, "fsdp": 2}
BIAS = {"router__bias__update_rate": 0.01}


@functools.cache
def prepare(config: Config) -> tuple[Training, optax.GradientTransformation, TrainStep]:
    """What trains, with an optimizer that remembers the last gradients; compiled once for each
    mesh.
    """
    tunable, schedule = (
        make_training(config, "cpu"),
        learning_rate_schedule(config.optimizer, config.train.num_steps),
    )
    own = make_optimizer(config.optimizer, schedule, config.router.learning_rate_factor)
    optimizer = optax.chain(remember_gradients(), own)
    return tunable, optimizer, make_train_step(optimizer, config.router, schedule, tunable.perturb)


def train(
    config: Config,
    batch: Batch,
    sizes: dict[str, int],
    steps: int = 1,
    change: Callable[[Any], Any] = lambda s: s,
) -> tuple[TrainState, dict[str, Any]]:
    """The state after some steps, and the last metrics."""
    mesh = mesh_of(**sizes)
    tunable, optimizer, step = prepare(config)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        state = change(init_state(tunable.make_model, optimizer, tunable.trainable))
        for _ in range(steps):
            state, metrics = step(state, on_mesh(batch, mesh))
        return jax.device_get((state, metrics))


def gradients_of(state: TrainState) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.flatten_with_path(state.opt_state[0])[0]
    }


def in_micro_batches(config: Config, batch: Batch) -> tuple[Config, Batch]:
    train = dataclasses.replace(config.train, gradient_accumulation=4)
    return dataclasses.replace(config, train=train), jax.tree.map(
        lambda rows: rows.reshape(4, 2, -1), batch
    )


def bias_of(state: TrainState) -> np.ndarray:
    return np.asarray(state.frozen.blocks.moe.router.bias[...])


def test_a_bias_moves_once_a_step_by_the_loads_of_the_whole_step() -> None:
    config = small_config(**BIAS)
    batch = packed_batch(config)
    state, metrics = train(config, batch, {})
    load = np.stack([metrics[f"router/layer_{layer:02d}/load"] for layer in range(2)])
    np.testing.assert_allclose(bias_of(state), 0.01 * np.sign(1 / 8 - load), rtol=1e-6)
    assert metrics["router/bias_range"] == pytest.approx(0.02)
    for sizes, (other, rows) in (
        (SPREAD, (config, batch)),
        ({}, in_micro_batches(config, batch)),
        (
            {},
            (
                dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none")),
                batch,
            ),
        ),
    ):
        np.testing.assert_array_equal(bias_of(train(other, rows, sizes)[0]), bias_of(state))


def test_evaluation_neither_moves_a_bias_nor_draws_noise() -> None:
    config = small_config(**BIAS, router__noise__gumbel=1.0)
    batch = packed_batch(config)
    state, _ = train(config, batch, {})
    with jax.set_mesh(mesh_of()):
        model = state.model()
        micro = jax.tree.map(lambda rows: rows[0], batch)
        forward = jax.jit(
            lambda model: (
                model(micro.tokens, micro.positions, micro.segment_ids).logits_BTV,
                model,
            )
        )
        one, after = forward(model)
        np.testing.assert_array_equal(one, forward(model)[0])
        np.testing.assert_array_equal(after.blocks.moe.router.bias[...], bias_of(state))


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
        config = small_config(router__load_balance__weight=0.0, **overrides)
        return train(config, packed_batch(config), {}, 60, prefer_some)[1]["router/max_violation"]

    assert violation(router__bias__update_rate=0.02) < 0.6 * violation()


@pytest.mark.parametrize("normalization", ["switch", "hf"])
def test_balance_of_the_global_batch_is_that_of_one_big_batch(normalization: str) -> None:
    keys = {
        "router__load_balance__weight": 10.0,
        "router__load_balance__normalization": normalization,
    }
    config = small_config(**keys, router__load_balance__scope="global")
    batch = packed_batch(config)
    whole, expected = train(small_config(**keys), batch, {})
    parts, got = train(*in_micro_batches(config, batch), {"expert": 2})
    assert got["load_balance_loss"] == pytest.approx(expected["load_balance_loss"], rel=1e-5)
    for name, gradient in gradients_of(whole).items():
        assert relative_norm(gradients_of(parts)[name], gradient) < 1e-5, name
    micro, other = train(*in_micro_batches(small_config(**keys), batch), {})
    assert (
        other["load_balance_loss"] > 1.001 * expected["load_balance_loss"]
    )  # And that is not the same thing.


@pytest.mark.parametrize(
    "keys",
    [
        {"router__load_balance__scope": "sequence", "router__load_balance__weight": 10.0},
        {
            "router__load_balance__weight": 0.0,
            "router__sequence_loss_weight": 10.0,
            "router__score": "sigmoid",
        },
    ],
    ids=["scope", "complementary"],
)
def test_balance_within_sequences_does_not_depend_on_micro_batches(keys: dict[str, Any]) -> None:
    config = small_config(**keys)
    batch = packed_batch(config)
    whole, expected = train(config, batch, {})
    parts, got = train(*in_micro_batches(config, batch), {"expert": 2})
    assert (
        got["sequence_balance_loss"]
        == pytest.approx(expected["sequence_balance_loss"], rel=1e-5)
        != 1
    )
    router = small_config().router
    plain = expected["loss"] + router.z_loss_weight * expected["router_z_loss"]
    assert expected["total_loss"] == pytest.approx(
        plain + 10.0 * expected["sequence_balance_loss"], rel=1e-6
    )
    for name, gradient in gradients_of(whole).items():
        assert relative_norm(gradients_of(parts)[name], gradient) < 1e-5, name


UNASKED = {"router__load_balance__weight": 0.0, "router__z_loss_weight": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "bias, sequence": {
        **BIAS,
        "router__score": "sigmoid",
        "router__load_balance__scope": "sequence",
    },
    "groups, capacity": {
        "router__choice": "group_limited",
        "router__num_groups": 4,
        "router__groups_per_token": 2,
        "dispatch__capacity_factor": 1.25,
        "dispatch__drop": "position",
    },
    "hash, drop by weight": {"router__choice": "hash", **UNASKED, "dispatch__capacity_factor": 1.0},
    "sinkhorn, noise": {
        "router__choice": "sinkhorn",
        "router__load_balance__weight": 0.0,
        "router__noise__jitter": 0.1,
        "router__noise__gumbel": 0.5,
    },
    "expert choice, dropout": {
        "router__choice": "expert_choice",
        "router__score": "softmax",
        "router__renormalize": False,
        "router__load_balance__weight": 0.0,
        "router__expert_dropout": 0.4,
    },
}


@pytest.mark.parametrize("keys", OPTIONS.values(), ids=OPTIONS)
def test_metrics_and_gradients_are_the_same_on_every_mesh(keys: dict[str, Any]) -> None:
    config = small_config(**keys)
    batch = packed_batch(config)
    one, expected = train(config, batch, {}, steps=2)
    two, got = train(config, batch, SPREAD, steps=2)
    for name, value in expected.items():
        if "device_imbalance" not in name:
            np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, gradient in gradients_of(one).items():
        assert relative_norm(gradients_of(two)[name], gradient) < 2e-5, name


CONTROLS: dict[str, dict[str, Any]] = {
    "random": {"router__choice": "random", **UNASKED},
    "uniform": {"router__choice": "uniform", **UNASKED},
    "dense": {"router__choice": "dense", "router__num_experts_per_token": 8, **UNASKED},
}


@pytest.mark.parametrize("keys", (OPTIONS | CONTROLS).values(), ids=OPTIONS | CONTROLS)
def test_masked_tokens_influence_nothing(keys: dict[str, Any]) -> None:
    config = small_config(**keys)
    batch = packed_batch(config)
    hidden = batch.segment_ids == 0
    garbage = dataclasses.replace(
        batch,
        tokens=np.where(hidden, 5, batch.tokens),
        positions=np.where(hidden, 3, batch.positions),
    )
    (one, expected), (other, got) = (train(config, rows, {}) for rows in (batch, garbage))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    for name, gradient in gradients_of(one).items():
        np.testing.assert_array_equal(gradients_of(other)[name], gradient, err_msg=name)


def test_expert_dropout_leaves_out_hidden_units_and_makes_up_for_them() -> None:
    config = small_config(router__expert_dropout=0.4)
    tunable = make_training(config, "cpu")
    with jax.set_mesh(mesh_of()):
        model = jax.jit(tunable.make_model)()
        dropped = jax.jit(lambda model, step: tunable.perturb(model, step, jnp.int32(0)))
        before = np.asarray(model.blocks.moe.experts.down.weight[...])
        one, two = (
            np.asarray(dropped(model, step).blocks.moe.experts.down.weight[...]) for step in (0, 1)
        )
    is_kept = one.any(axis=-1)
    assert 0.5 < is_kept.mean() < 0.7
    np.testing.assert_allclose(one, np.where(is_kept[..., None], before / 0.6, 0), rtol=1e-6)
    assert (two.any(axis=-1) != is_kept).any()


def test_a_router_learns_at_its_own_rate_in_pretraining_or_not_at_all() -> None:
    config = small_config()
    batch = packed_batch(config)

    def moved(factor: float) -> tuple[float, float]:
        settings = dataclasses.replace(
            config, router=dataclasses.replace(config.router, learning_rate_factor=factor)
        )
        tunable = make_training(settings, "cpu")
        with jax.set_mesh(mesh_of()):
            before = jax.device_get(jax.jit(tunable.make_model)())
        after = train(settings, batch, {})[0].model()
        router, head = (
            (lambda model: model.blocks.moe.router.gate.weight[...]),
            lambda model: model.unembed.weight[...],
        )
        return tuple(
            float(np.abs(np.asarray(of(after)) - np.asarray(of(before))).max())
            for of in (router, head)
        )

    normal, slow, frozen = map(moved, (1.0, 0.25, 0.0))
    assert slow == pytest.approx((0.25 * normal[0], normal[1]), rel=1e-3)
    assert frozen[0] == 0 < frozen[1]


def test_metrics_are_their_formulas() -> None:
    config = small_config(router__load_balance__weight=0.0)
    batch = packed_batch(config)
    state, metrics = train(config, batch, SPREAD)
    tunable = make_training(config, "cpu")
    with jax.set_mesh(mesh_of()), jax.default_matmul_precision("highest"):
        model = jax.jit(tunable.make_model)()
        micro = jax.tree.map(lambda rows: rows[0], batch)
        forward = jax.jit(
            lambda model: model(micro.tokens, micro.positions, micro.segment_ids).routing
        )
        routing = jax.device_get(forward(model))
    real = batch.segment_ids[0] > 0
    logits = routing.logits_BTE[:, real].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    load = np.stack(
        [np.bincount(chosen.reshape(-1), minlength=8) for chosen in routing.experts_BTA[:, real]]
    )
    share, ordered = load / load.sum(axis=-1, keepdims=True), np.sort(p, axis=-1)
    of_shards = share.reshape(2, 4, 2).sum(axis=-1)
    expected = {
        "load": share,
        "coefficient_of_variation": load.std(axis=-1) / load.mean(axis=-1),
        "max_violation": load.max(axis=-1) / load.mean(axis=-1) - 1,
        "min_load": load.min(axis=-1) / load.mean(axis=-1),
        "dead_experts": (load == 0).sum(axis=-1),
        "load_entropy": -(share * np.log(share)).sum(axis=-1) / np.log(8),
        "gate_entropy": -(p * np.log(p)).sum(axis=-1).mean(axis=-1) / np.log(8),
        "top1_margin": (ordered[..., -1] - ordered[..., -2]).mean(axis=-1),
        "logit_rms": np.sqrt((logits**2).mean(axis=(1, 2))),
        "logit_max": np.abs(logits).max(axis=(1, 2)),
        "dropped_fraction": np.zeros(2),
        "overflowed_fraction": np.zeros(2),
        "device_imbalance": of_shards.max(axis=-1) * 4 - 1,
        "running_max_violation": load.max(axis=-1) / load.mean(axis=-1) - 1,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(
            metrics[f"router/{name}"], value.mean(axis=0), rtol=1e-4, atol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(
            metrics[f"router/layer_01/{name}"], value[1], rtol=1e-4, atol=1e-6, err_msg=name
        )
    named = {name for name in metrics if name.startswith("router/layer_00/")}
    assert named == {f"router/layer_00/{name}" for name in expected}


def test_metrics_cost_under_two_percent_of_a_step() -> None:
    """Of the compiled FLOPs and bytes, at hidden size 512."""
    config = small_config(
        model__hidden_size=512,
        model__intermediate_size=1792,
        model__num_layers=1,
        model__head_dim=64,
        model__num_heads=8,
        train__batch_size=2,
        train__sequence_length=512,
    )
    tunable, schedule = make_training(config, "cpu"), lambda step: 1e-3
    optimizer = make_optimizer(config.optimizer, schedule)
    losses = ("loss", "total_loss", "load_balance_loss", "router_z_loss", "grad_norm")
    with jax.set_mesh(mesh_of()):
        state = jax.eval_shape(lambda: TrainState.create(tunable.make_model(), optimizer))
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, packed_batch(config)))
        step = make_train_step(optimizer, config.router, schedule, tunable.perturb)

        def bare(state: TrainState, batch: Batch) -> Any:
            state, metrics = step.__wrapped__(state, batch)
            return dataclasses.replace(state, recent_load_LE=None), {
                name: metrics[name] for name in losses
            }

        costs = [
            jax.jit(function).lower(state, batch).compile().cost_analysis()
            for function in (step, bare)
        ]
    for name in ("flops", "bytes accessed"):
        assert 1 <= costs[0][name] / costs[1][name] < 1.02, name
