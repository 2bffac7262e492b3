"""One optimizer step over several micro-batches."""

import dataclasses
import functools
import operator
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
from mixtral_jax.training.loss import Loss, LossParts, StepTotals, next_token_loss, sum_losses
from mixtral_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = jax.stages.Wrapped  # (TrainState, Batch) -> (TrainState, Metrics)

# Decay per step of the running expert load (an average over about 100 steps).
RUNNING_LOAD_DECAY = 0.99

# (model, number of the step, number of the micro-batch in it) -> the model in training mode, with
# the noise of training.
Perturb = Callable[[Any, jax.Array, jax.Array], Any]


def make_train_step(
    optimizer: optax.GradientTransformation,
    router: RouterConfig,
    schedule: optax.Schedule,
    perturb: Perturb,
    bias_rate: optax.Schedule | None = None,
    loss: Loss = next_token_loss,
) -> TrainStep:
    """Makes the jitted train step; it donates its state's buffers to the new state.

    Gradients of micro-batches are summed in the parameters' dtype, one micro-batch at a time.
    Frozen parameters have no gradient.

    Args:
        schedule: the learning rate of a step, for the metrics.
        perturb: puts the model in training mode.
        bias_rate: by how much balance biases move after a step; by default `router.bias` says it.
        loss: of the task; the losses of the router are added to it.
    """
    bias_rate = bias_rate or optax.constant_schedule(router.bias.update_rate)

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        learned = losses_and_gradient(state, batch, perturb=perturb, loss=loss, router=router)
        gradient, routing = learned.gradient, learned.parts.routing
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
            trained = typing.cast(nnx.State, optax.apply_updates(state.trained, updates))
        running_load_LE = RUNNING_LOAD_DECAY * state.recent_load_LE + routing.load_E
        biases = move_biases(state.frozen, routing, bias_rate(state.step), router.bias)
        per_layer = {"running_max_violation": max_violation(running_load_LE), **biases.metrics}
        metrics = step_metrics(learned.parts, per_layer) | {
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "tokens": jnp.sum(batch.segment_ids > 0),
        }
        next_state = dataclasses.replace(
            state,
            step=state.step + 1,
            trained=trained,
            frozen=biases.frozen,
            opt_state=opt_state,
            recent_load_LE=running_load_LE,
        )
        return next_state, metrics

    return train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossesAndGradient:
    """Losses of a micro-batch or of a step, and the gradient of the trained parameters."""

    parts: LossParts
    gradient: nnx.State

    def __add__(self, other: "LossesAndGradient") -> "LossesAndGradient":
        gradient = jax.tree.map(jnp.add, self.gradient, other.gradient)
        return LossesAndGradient(self.parts + other.parts, gradient)


def losses_and_gradient(
    state: TrainState, batch: Batch, *, perturb: Perturb, loss: Loss, router: RouterConfig
) -> LossesAndGradient:
    """The losses of a step and their gradient, summed over its micro-batches."""

    def forward(trained: nnx.State, number: jax.Array, micro: Batch) -> ModelOutput:
        model = dataclasses.replace(state, trained=trained).model()
        model = perturb(model, state.step, number)
        return model(micro.tokens, micro.positions, micro.segment_ids)

    def count_routes(number: jax.Array, micro: Batch) -> RoutingSums:
        return forward(state.trained, number, micro).routing.sums

    def learn(number: jax.Array, micro: Batch) -> LossesAndGradient:
        def total_loss(trained: nnx.State) -> tuple[jax.Array, LossParts]:
            parts = sum_losses(loss, forward(trained, number, micro), micro, totals, router)
            return parts.total_loss, parts

        (_, parts), gradient = jax.value_and_grad(total_loss, has_aux=True)(state.trained)
        return LossesAndGradient(parts, gradient)

    totals = count_tokens(batch)
    if router.load_balance.scope == "global" and batch.tokens.shape[0] > 1:
        routing = sum_micro_batches(count_routes, add_sums, batch)
        totals = dataclasses.replace(totals, routing=routing)
    return sum_micro_batches(learn, operator.add, batch)


def peak_memory_bytes(step: jax.stages.Compiled) -> int | None:
    """Peak memory of a compiled step on each device; None if the back end does not report it."""
    memory = step.memory_analysis()
    if not memory:
        return None
    (device, *_) = jax.tree.leaves(step.input_shardings)[0].device_set
    if device.platform == "cpu":  # XLA:CPU leaves temporaries out of its peak.
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def count_tokens(batch: Batch) -> StepTotals:
    """Supervised and real tokens of a step, each at least 1, float32."""
    return StepTotals(
        supervised=jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32),
        real=jnp.maximum(jnp.sum(batch.segment_ids > 0), 1).astype(jnp.float32),
    )


def sum_micro_batches(
    compute: Callable[[jax.Array, Batch], Any], add: Callable[[Any, Any], Any], batch: Batch
) -> Any:
    """The sum of `compute(number, micro_batch)` over the micro-batches of a step, one at a time."""
    num_micro_batches = batch.tokens.shape[0]
    micro_batches = (jnp.arange(num_micro_batches), batch)
    if num_micro_batches == 1:
        # There is nothing to sum: a loop would write a copy of the whole gradient.
        return compute(*jax.tree.map(lambda rows: rows[0], micro_batches))
    # Both uses below share one trace, which takes seconds. Inlined, it leaves no call in a program.
    compute = jax.jit(compute, inline=True)
    micro_shapes = jax.tree.map(lambda rows: rows[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x), jax.eval_shape(compute, *micro_shapes))

    def add_micro_batch(total: Any, micro: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return add(total, compute(*micro)), None

    return jax.lax.scan(add_micro_batch, zeros, micro_batches)[0]


@dataclasses.dataclass(frozen=True)
class MovedBiases:
    """Frozen variables after a step, and router metrics of the biases among them, each [L]."""

    frozen: nnx.State
    metrics: Metrics


def move_biases(
    frozen: nnx.State,
    routing: RoutingSums,
    rate: jax.typing.ArrayLike,
    config: BalanceBiasConfig,
) -> MovedBiases:
    """Moves the balance biases among the frozen variables, if there are any, by a step's load."""
    biases, rest = nnx.split_state(frozen, BalanceBias, ...)
    if not jax.tree.leaves(biases):
        return MovedBiases(frozen, {})
    move = functools.partial(
        next_bias, load_LE=routing.load_E, rate=rate, is_zero_mean=config.is_zero_mean
    )
    moved = jax.tree.map(move, biases)
    (bias_LE,) = jax.tree.leaves(moved)
    bias_range_L = jnp.max(bias_LE, axis=-1) - jnp.min(bias_LE, axis=-1)
    return MovedBiases(nnx.merge_state(moved, rest), {"bias_range": bias_range_L})


def step_metrics(parts: LossParts, per_layer: Metrics) -> Metrics:
    """Named figures of a step: router metrics as means over layers, and as `router/layer_NN/` each.

    `per_layer`, each [L], are further router metrics, which know more than this step's routes.
    """
    return {
        "loss": parts.loss,
        "total_loss": parts.total_loss,
        "load_balance_loss": parts.load_balance_loss,
        "sequence_balance_loss": parts.sequence_balance_loss,
        "router_z_loss": parts.router_z_loss,
        **name_metrics(router_metrics(parts.routing) | per_layer),
    }
