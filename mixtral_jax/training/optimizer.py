"""The optimizers by their names, with warm-up, cosine decay, clipping and weight decay."""

from collections.abc import Callable

import optax

from mixtral_jax.config import BalanceBiasConfig, OptimizerConfig, OptimizerName
from mixtral_jax.training.adafactor import scale_by_factored_moments
from mixtral_jax.training.matrices import by_name
from mixtral_jax.training.muon import orthogonalize


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
    """Clips by global norm, then the optimizer with decoupled weight decay of matrices only.

    The router learns at `router_factor` times the rate, its decay with it.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        # As in `optax.adamw`, so that its state lies where it always lay in checkpoints.
        optax.chain(
            OPTIMIZERS[config.name](config),
            optax.add_decayed_weights(
                config.weight_decay,
                lambda params: by_name(params, lambda names: "scale" not in names),
            ),
            optax.scale_by_learning_rate(schedule),
        ),
        optax.masked(
            optax.scale(router_factor),
            lambda params: by_name(params, lambda names: "router" in names),
        ),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980); with weight decay beside it, AdamW (arXiv 1711.05101).

    The second moment keeps the dtype of its parameter. In bfloat16 it would never fall, however
    small gradients become: with beta2 = 0.999 a step takes off a thousandth, which rounding to
    eight bits puts back. A step takes a tenth off the first moment.
    """
    return optax.scale_by_adam(
        config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype
    )


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    del config
    return scale_by_factored_moments()


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for the matrices in the layers; Adam for the router, scales and both embeddings."""

    def choose(names: set[str | None]) -> str:
        is_matrix = "blocks" in names and not names & {"router", "scale"}
        return "muon" if is_matrix else "adam"

    momentum = optax.trace(config.beta1, nesterov=True, accumulator_dtype=config.first_moment_dtype)
    return optax.partition(
        {"muon": optax.chain(momentum, orthogonalize()), "adam": _adam(config)},
        lambda params: by_name(params, choose),
    )


# What turns gradients into the direction of a step, before weight decay and the learning rate.
OPTIMIZERS: dict[OptimizerName, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "muon": _muon,
}
