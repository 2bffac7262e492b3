"""The router's metrics of a step: their formulas, and what they cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.assemble import make_training
from mixtral_jax.training.state import TrainState
from tests.cases import mesh_of, packed_batch, small_config
from tests.training.steps import prepare, train


def test_metrics_are_their_formulas() -> None:
    config = small_config(router__load_balance__weight=0.0)
    batch = packed_batch(config)
    state, metrics = train(config, batch, {"expert": 4, "fsdp": 2})
    with jax.set_mesh(mesh_of()), jax.default_matmul_precision("highest"):
        model = jax.jit(prepare(config).training.make_model)()
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
    """In FLOPs and bytes of the compiled step, at hidden size 512."""
    config = small_config(
        model__hidden_size=512,
        model__intermediate_size=1792,
        model__num_layers=1,
        model__head_dim=64,
        model__num_heads=8,
        train__batch_size=2,
        train__sequence_length=512,
    )
    training = make_training(config, "cpu")
    losses = ("loss", "total_loss", "load_balance_loss", "router_z_loss", "grad_norm")
    with jax.set_mesh(mesh_of()):
        state = training.abstract_state()
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, packed_batch(config)))

        def bare(state: TrainState, batch: Batch) -> Any:
            state, metrics = training.train_step.__wrapped__(state, batch)
            return dataclasses.replace(state, recent_load_LE=None), {
                name: metrics[name] for name in losses
            }

        costs = [
            jax.jit(function).lower(state, batch).compile().cost_analysis()
            for function in (training.train_step, bare)
        ]
    for name in ("flops", "bytes accessed"):
        assert 1 <= costs[0][name] / costs[1][name] < 1.02, name
