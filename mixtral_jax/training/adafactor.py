"""Adafactor (arXiv 1804.04235): the second moment of a matrix as the product of two vectors.

It keeps no first moment, so its state is a thousandth of the parameters. The learning rate is
absolute, as that of AdamW, and not a fraction of the parameters' size (section 8 of the paper).
Each matrix of a stack is treated on its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixtral_jax.training.matrices import matrix_of

# Section 7.2: the second moment of step t decays by 1 - t ** -0.8.
_DECAY_EXPONENT = 0.8
# Added to each squared gradient (epsilon 1 of section 9).
_SMALLEST_SQUARE = 1e-30
# The largest root mean square of an update, before the learning rate (section 6).
_MAX_UPDATE_RMS = 1.0


class FactoredMoments(NamedTuple):
    """The second moments, as means over the outputs and over the inputs of each matrix, float32.

    A vector has no outputs, so its `over_outputs` is its whole second moment.
    """

    num_steps: jax.Array
    over_outputs: Any
    over_inputs: Any


def scale_by_factored_moments() -> optax.GradientTransformation:
    """Divides gradients by the root of their factored second moment, and limits the update."""

    def mean_squares(gradients: Any, *, of_outputs: bool) -> Any:
        def mean_square(path: tuple[Any, ...], gradient: jax.Array) -> jax.Array:
            matrix = matrix_of(path, gradient.ndim)
            square = jnp.square(gradient.astype(jnp.float32)) + _SMALLEST_SQUARE
            return jnp.mean(square, axis=matrix.outputs if of_outputs else matrix.inputs)

        return jax.tree_util.tree_map_with_path(mean_square, gradients)

    def init(params: Any) -> FactoredMoments:
        # The means of the parameters have the shapes and the layouts of those of gradients.
        zeros = [
            jax.tree.map(jnp.zeros_like, mean_squares(params, of_outputs=of_outputs))
            for of_outputs in (True, False)
        ]
        return FactoredMoments(jnp.zeros((), jnp.int32), *zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredMoments]:
        del params
        num_steps = state.num_steps + 1
        new_share = num_steps.astype(jnp.float32) ** -_DECAY_EXPONENT

        def move(moment: jax.Array, square: jax.Array) -> jax.Array:
            return moment + new_share * (square - moment)

        over_outputs, over_inputs = (
            jax.tree.map(move, moments, mean_squares(updates, of_outputs=of_outputs))
            for moments, of_outputs in ((state.over_outputs, True), (state.over_inputs, False))
        )
        updates = jax.tree_util.tree_map_with_path(_rescale, updates, over_outputs, over_inputs)
        return updates, FactoredMoments(num_steps, over_outputs, over_inputs)

    return optax.GradientTransformation(init, update)


def _rescale(
    path: tuple[Any, ...], gradient: jax.Array, over_outputs: jax.Array, over_inputs: jax.Array
) -> jax.Array:
    """The update of a stack of matrices, at most `_MAX_UPDATE_RMS` in each (algorithms 4 and 5)."""
    matrix = matrix_of(path, gradient.ndim)
    share = over_outputs / jnp.mean(over_outputs, axis=matrix.inputs, keepdims=True)
    # Two roots: the product of two tiny moments would be zero.
    by_input = jnp.expand_dims(jax.lax.rsqrt(share), matrix.outputs)
    by_output = jnp.expand_dims(jax.lax.rsqrt(over_inputs), matrix.inputs)
    update = gradient * by_input * by_output
    square = jnp.mean(jnp.square(update), axis=matrix.inputs + matrix.outputs, keepdims=True)
    limited = update / jnp.maximum(1, jnp.sqrt(square) / _MAX_UPDATE_RMS)
    return limited.astype(gradient.dtype)
