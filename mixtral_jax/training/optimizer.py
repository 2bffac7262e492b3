"""AdamW with warm-up, cosine decay and clipping."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from mixtral_jax.config import BalanceBiasConfig, OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear from 0, then cosine to a fraction of the peak; both are fractions of `num_steps`.

    The first step already learns: step s has the rate of s + 1.
    """
    warmup_steps = max(1, round(config.warmup_fraction * num_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )
    return lambda step: schedule(step + 1)


def bias_rate_schedule(config: BalanceBiasConfig, num_steps: int) -> optax.Schedule:
    """By how much the balance bias moves after each step.

    Constant, then falling to 0 in a straight line over the last `decay_fraction` of the run.
    """
    decay_steps = round(config.decay_fraction * num_steps)
    if decay_steps == 0:
        return optax.constant_schedule(config.update_rate)
    return optax.linear_schedule(
        config.update_rate, 0.0, decay_steps, transition_begin=num_steps - decay_steps
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, router_factor: float = 1.0
) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW (arXiv 1711.05101) that decays matrices only.

    The router learns at `router_factor` times the rate, its decay with it.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: _by_name(params, lambda names: "scale" not in names),
        ),
        optax.masked(
            optax.scale(router_factor),
            lambda params: _by_name(params, lambda names: "router" in names),
        ),
    )


def _by_name(params: Any, is_chosen: Callable[[set[str | None]], bool]) -> Any:
    """True for the parameters chosen by the names on their paths.

    Not by rank, which would not tell the scale of a norm, for one: in the stack of layers every
    array has one more.
    """

    def by_path(path: tuple[Any, ...], _: jax.Array) -> bool:
        return is_chosen({getattr(key, "key", getattr(key, "name", None)) for key in path})

    return jax.tree_util.tree_map_with_path(by_path, params)
