"""Muon: updates of matrices that are orthogonal, so that no direction of a matrix learns alone.

The momentum of a matrix is made nearly orthogonal by a Newton-Schulz iteration (Jordan et al.,
2024, https://kellerjordan.github.io/posts/muon) and scaled to the size of an update of AdamW (arXiv
2502.16982, section 2.2), so that both may share a learning rate. Each matrix of a stack is treated
on its own. Leaves to `optimizer` which parameters learn by AdamW instead.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixtral_jax.parallel.rules import specs_to_whole_matrices
from mixtral_jax.training.matrices import Matrix, matrix_of

# The factors a, b and c of x <- a x + b (x x^T) x + c (x x^T)^2 x. This step, repeated, moves
# singular values to between 0.7 and 1.2.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
# The root mean square of an update of AdamW, by experience.
_UPDATE_RMS = 0.2
_SMALLEST_NORM = 1e-8


def orthogonalize() -> optax.GradientTransformation:
    """Replaces each matrix of a stack over layers by a nearly orthogonal one, of AdamW's size."""

    def update(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, stack: _orthogonalize_stack(stack, matrix_of(path, stack.ndim)), updates
        )

    return optax.stateless(update)


def _orthogonalize_stack(stack: jax.Array, matrix: Matrix) -> jax.Array:
    """Deals the layers to the devices, so that each device has whole matrices, and none has all.

    The matrices come back as they came. The numbers do not depend on the mesh, as no device sums
    over a part of a matrix.
    """
    sharding = jax.typeof(stack).sharding
    specs = specs_to_whole_matrices(sharding.spec, matrix.num_stacked)
    num_layers = stack.shape[0]
    num_devices = math.prod(sharding.mesh.shape[axis] for axis in jax.tree.leaves(specs[-1][0]))
    missing = -num_layers % num_devices
    padded = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
    stacked = padded.shape[: matrix.num_stacked]
    num_inputs = math.prod(stack.shape[dimension] for dimension in matrix.inputs)
    num_outputs = math.prod(stack.shape[dimension] for dimension in matrix.outputs)
    x = functools.reduce(jax.reshard, specs, padded).reshape(*stacked, num_inputs, num_outputs)
    x = _UPDATE_RMS * math.sqrt(max(num_inputs, num_outputs)) * newton_schulz(x)
    x = x.reshape(padded.shape).astype(stack.dtype)
    return functools.reduce(jax.reshard, reversed(specs), x)[:num_layers]


def newton_schulz(x: jax.Array) -> jax.Array:
    """The nearest semi-orthogonal matrices, roughly; x is [..., inputs, outputs].

    Singular values come out between 0.7 and 1.2, those near 0 below that.
    """
    if x.shape[-2] > x.shape[-1]:  # The products of the shorter side are smaller.
        return newton_schulz(x.mT).mT
    a, b, c = _NEWTON_SCHULZ

    def iterate(_: int, x: jax.Array) -> jax.Array:
        square = x @ x.mT
        return a * x + (b * square + c * square @ square) @ x

    x = x.astype(jnp.float32)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + _SMALLEST_NORM)
    return jax.lax.fori_loop(0, _NUM_ITERATIONS, iterate, x)
