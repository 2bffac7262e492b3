"""Router options over whole steps: the same on every mesh, blind to masked tokens; noise, what is
frozen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import keep_some, mesh_of, packed_batch, relative_norm, small_config
from tests.training.steps import gradients_of, initial_state, prepare, train

UNASKED = {"router__load_balance__weight": 0.0, "router__z_loss_weight": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "bias, sequence": {
        "router__bias__update_rate": 0.01,
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


@pytest.mark.parametrize("keys", keep_some(OPTIONS, "groups, capacity"))
def test_metrics_and_gradients_are_the_same_on_every_mesh(keys: dict[str, Any]) -> None:
    config = small_config(**keys)
    batch = packed_batch(config)
    one, expected = train(config, batch, {}, steps=2)
    two, got = train(config, batch, {"expert": 4, "fsdp": 2}, steps=2)
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


@pytest.mark.parametrize("keys", keep_some(OPTIONS | CONTROLS, "groups, capacity", "dense"))
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
    training = prepare(config).training
    with jax.set_mesh(mesh_of()):
        model = jax.jit(training.make_model)()
        dropped = jax.jit(lambda model, step: training.perturb(model, step, jnp.int32(0)))
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
        before = initial_state(settings).model()
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
