"""One optimizer step over several micro-batches, and the loss of a batch without one."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mixtral_jax.config import RouterConfig
from mixtral_jax.model.balance import router_metrics
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.train.loss import LossParts, StepTotals, sum_losses
from mixtral_jax.train.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = jax.stages.Wrapped  # (TrainState, Batch) -> (TrainState, Metrics)


# A model, the number of the step, and of the micro-batch in it -> the model that the loss is of.
Perturb = Callable[[Any, jax.Array, jax.Array], Any]


def make_train_step(
    optimizer: optax.GradientTransformation,
    router: RouterConfig,
    schedule: optax.Schedule,
    perturb: Perturb | None = None,
) -> TrainStep:
    """The compiled step; it gives up its state's buffers to the new one.

    Gradients of micro-batches are summed in the parameters' dtype, one micro-batch at a time. Frozen
    parameters have none. `perturb` makes noise that belongs to training alone, as dropout is.
    """

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals = StepTotals(
            supervised=jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32),
            real=jnp.maximum(jnp.sum(batch.segment_ids > 0), 1).astype(jnp.float32),
        )
        compute = functools.partial(_value_and_grad, state, totals, router, perturb)
        micro_batches = (jnp.arange(batch.tokens.shape[0]), batch)
        micro_shapes = jax.tree.map(lambda rows: rows[0], micro_batches)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x), jax.eval_shape(compute, *micro_shapes))

        def accumulate(summed, micro_batch):
            return jax.tree.map(jnp.add, summed, compute(*micro_batch)), None

        (parts, grads), _ = jax.lax.scan(accumulate, zeros, micro_batches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        metrics = step_metrics(parts) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "tokens": jnp.sum(batch.segment_ids > 0),
        }
        trained = typing.cast(nnx.State, optax.apply_updates(state.trained, updates))
        return dataclasses.replace(state, step=state.step + 1, trained=trained, opt_state=opt_state), metrics

    return train_step


def peak_memory_bytes(step: jax.stages.Compiled) -> int | None:
    """What a compiled step needs of each device's memory; None where the back end does not say."""
    memory = step.memory_analysis()
    if not memory:
        return None
    (device, *_) = jax.tree.leaves(step.input_shardings)[0].device_set
    if device.platform == "cpu":  # XLA:CPU leaves temporaries out of its peak.
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return kept + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def _value_and_grad(
    state: TrainState,
    totals: StepTotals,
    router: RouterConfig,
    perturb: Perturb | None,
    number: jax.Array,
    micro: Batch,
):
    def loss_of(trained):
        model: Any = dataclasses.replace(state, trained=trained).model()
        model = perturb(model, state.step, number) if perturb else model
        output = model(micro.tokens, micro.positions, micro.segment_ids)
        parts = sum_losses(output, jnp.asarray(micro.targets), jnp.asarray(micro.loss_mask), totals, router)
        return parts.total_loss, parts

    (_, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
    return parts, grads


def step_metrics(parts: LossParts) -> Metrics:
    """Named figures of a step; router metrics as means over layers and, under `router/layer_NN/`, each."""
    metrics = {
        "loss": parts.loss,
        "total_loss": parts.total_loss,
        "load_balance_loss": parts.load_balance_loss,
        "router_z_loss": parts.router_z_loss,
    }
    for name, value_L in router_metrics(parts.routing).items():
        metrics[f"router/{name}"] = jnp.mean(value_L, axis=0)
        metrics |= {f"router/layer_{layer:02d}/{name}": value_L[layer] for layer in range(value_L.shape[0])}
    return metrics
