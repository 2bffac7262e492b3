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

from mixtral_jax.config import BalanceBiasConfig, RouterConfig
from mixtral_jax.model.balance import RoutingSums, add_sums, next_bias
from mixtral_jax.model.router import BalanceBias
from mixtral_jax.model.routing_metrics import max_violation, name_metrics, router_metrics
from mixtral_jax.model.transformer import ModelOutput
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.train.loss import LossParts, StepTotals, sum_losses
from mixtral_jax.train.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = jax.stages.Wrapped  # (TrainState, Batch) -> (TrainState, Metrics)

# What is left of a load after another step, in the load of late: a memory of about 100 steps.
RECENT = 0.99

# A model, the number of the step, and of the micro-batch in it -> the model that the loss is of.
Perturb = Callable[[Any, jax.Array, jax.Array], Any]


def make_train_step(
    optimizer: optax.GradientTransformation,
    router: RouterConfig,
    schedule: optax.Schedule,
    perturb: Perturb,
    bias_rate: optax.Schedule | None = None,
) -> TrainStep:
    """The compiled step; it gives up its state's buffers to the new one.

    Gradients of micro-batches are summed in the parameters' dtype, one micro-batch at a time.
    Frozen parameters have none. `perturb` puts the model in training, with the noise that belongs
    to it; `bias_rate` says how far balance biases move after a step (by default as far as the
    config's).
    """
    bias_rate = bias_rate or optax.constant_schedule(router.bias.update_rate)

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        forward = functools.partial(_forward, state, perturb)
        totals = _sum_totals(functools.partial(forward, state.trained), batch, router)
        gradient = functools.partial(_losses_and_gradient, forward, state.trained, totals, router)
        parts, grads = _sum_over(gradient, _add_gradients, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        load_LE = RECENT * state.recent_load_LE + parts.routing.load_E
        frozen, bias_figures = move_biases(
            state.frozen, parts.routing, bias_rate(state.step), router.bias
        )
        figures_of_layers = {"running_max_violation": max_violation(load_LE), **bias_figures}
        metrics = step_metrics(parts, figures_of_layers) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "tokens": jnp.sum(batch.segment_ids > 0),
        }
        trained = typing.cast(nnx.State, optax.apply_updates(state.trained, updates))
        changed = {
            "trained": trained,
            "frozen": frozen,
            "opt_state": opt_state,
            "recent_load_LE": load_LE,
        }
        return dataclasses.replace(state, step=state.step + 1, **changed), metrics

    return train_step


def peak_memory_bytes(step: jax.stages.Compiled) -> int | None:
    """What a compiled step needs of each device's memory; None where the back end does not say."""
    memory = step.memory_analysis()
    if not memory:
        return None
    (device, *_) = jax.tree.leaves(step.input_shardings)[0].device_set
    if device.platform == "cpu":  # XLA:CPU leaves temporaries out of its peak.
        kept = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        return kept + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def _forward(
    state: TrainState, perturb: Perturb, trained: nnx.State, number: jax.Array, micro: Batch
) -> ModelOutput:
    model = perturb(dataclasses.replace(state, trained=trained).model(), state.step, number)
    return model(micro.tokens, micro.positions, micro.segment_ids)


def _sum_totals(
    forward: Callable[[jax.Array, Batch], ModelOutput], batch: Batch, router: RouterConfig
) -> StepTotals:
    """Tokens of the step and, where the global batch is balanced, what a first forward pass over it
    counts.
    """
    totals = StepTotals(
        supervised=jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32),
        real=jnp.maximum(jnp.sum(batch.segment_ids > 0), 1).astype(jnp.float32),
    )
    if router.load_balance.scope != "global" or batch.tokens.shape[0] == 1:
        return totals

    def count(number: jax.Array, micro: Batch) -> RoutingSums:
        return forward(number, micro).routing.sums

    return dataclasses.replace(totals, routing=_sum_over(count, add_sums, batch))


def _losses_and_gradient(
    forward: Callable[..., ModelOutput],
    trained: nnx.State,
    totals: StepTotals,
    router: RouterConfig,
    number: jax.Array,
    micro: Batch,
) -> tuple[LossParts, nnx.State]:
    def loss_of(trained: nnx.State) -> tuple[jax.Array, LossParts]:
        output = forward(trained, number, micro)
        parts = sum_losses(
            output, jnp.asarray(micro.targets), jnp.asarray(micro.loss_mask), totals, router
        )
        return parts.total_loss, parts

    (_, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return parts, grads


def _sum_over(
    compute: Callable[[jax.Array, Batch], Any], add: Callable[[Any, Any], Any], batch: Batch
) -> Any:
    """The sum of what `compute` gives of each micro-batch, by its number and rows, one at a time."""
    micro_batches = (jnp.arange(batch.tokens.shape[0]), batch)
    micro_shapes = jax.tree.map(lambda rows: rows[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x), jax.eval_shape(compute, *micro_shapes))
    return jax.lax.scan(
        lambda summed, micro: (add(summed, compute(*micro)), None), zeros, micro_batches
    )[0]


def _add_gradients(
    one: tuple[LossParts, nnx.State], other: tuple[LossParts, nnx.State]
) -> tuple[LossParts, nnx.State]:
    return one[0] + other[0], jax.tree.map(jnp.add, one[1], other[1])


def move_biases(
    frozen: nnx.State, routing: RoutingSums, rate: jax.typing.ArrayLike, config: BalanceBiasConfig
) -> tuple[nnx.State, Metrics]:
    """The frozen variables, with balance biases, where there are any, moved by a step's loads; and
    their range.
    """
    biases, rest = nnx.split_state(frozen, BalanceBias, ...)
    if not jax.tree.leaves(biases):
        return frozen, {}
    move = functools.partial(
        next_bias, load_LE=routing.load_E, rate=rate, is_zero_mean=config.is_zero_mean
    )
    moved = jax.tree.map(move, biases)
    (bias_LE,) = jax.tree.leaves(moved)
    return nnx.merge_state(moved, rest), {
        "bias_range": jnp.max(bias_LE, axis=-1) - jnp.min(bias_LE, axis=-1)
    }


def step_metrics(parts: LossParts, figures_of_layers: Metrics) -> Metrics:
    """Named figures of a step; router metrics as means over layers and, under `router/layer_NN/`,
    each.

    `figures_of_layers`, each [L], are router metrics that know of more than this step's routes.
    """
    return {
        "loss": parts.loss,
        "total_loss": parts.total_loss,
        "load_balance_loss": parts.load_balance_loss,
        "sequence_balance_loss": parts.sequence_balance_loss,
        "router_z_loss": parts.router_z_loss,
        **name_metrics(router_metrics(parts.routing) | figures_of_layers),
    }
