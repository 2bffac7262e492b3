"""AdamW with warm-up, cosine decay and clipping."""

from typing import Any

import jax
import optax

from mixtral_jax.config import OptimizerConfig


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


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW (arXiv 1711.05101) that decays matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params: Any) -> Any:
    """False for the scales of norms. By name, not by rank: in the stack of layers every array has one more."""

    def by_name(path: tuple[Any, ...], _: jax.Array) -> bool:
        return "scale" not in {getattr(key, "key", getattr(key, "name", None)) for key in path}

    return jax.tree_util.tree_map_with_path(by_name, params)
