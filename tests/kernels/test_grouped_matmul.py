"""Each kernel against a loop over experts, for every shape of imbalance, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import blocks
from mixtral_jax.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_swiglu,
    swiglu_in_stack,
    swiglu_of_layer,
)
from mixtral_jax.kernels.groups import RowGroups
from tests.cases import relative_norm

D, F = 24, 40
SPLITS = {
    "even": (100, 100, 100, 100),
    "skewed": (391, 5, 3, 1),
    "all to one": (0, 0, 400, 0),
    "empty first": (0, 250, 0, 90),
    "none": (0, 0, 0, 0),
    "a block exactly": (256, 0, 144, 0),
}


def expert_of_rows(rows, R):
    expert = np.repeat(np.arange(len(rows)), rows)
    return np.concatenate([expert, np.full(R - len(expert), -1)])


def groups_of(rows, balanced_rows=400):
    return RowGroups(jnp.asarray(rows, jnp.int32), balanced_rows)


def inputs(R=400, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((R, D), (4, D, F), (4, D, F), (4, F, D))
    return [jnp.asarray(rng.normal(size=shape) / 5, jnp.float32) for shape in shapes]


@jax.jit
def swiglu_by_loop(x, gate, up, down, expert):
    y = sum(
        jnp.where((expert == e)[:, None], (jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e], 0)
        for e in range(len(gate))
    )
    return y


@functools.partial(jax.jit, static_argnums=0)
def sum_of_squares_and_gradients(swiglu, expert, arrays, rows):
    """What `swiglu(*arrays, rows)` gives in rows that have an expert, its squares summed."""

    def loss(*arrays):
        y = jnp.where((expert >= 0)[:, None], swiglu(*arrays, rows), 0)
        return jnp.sum(y**2), y

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)


SWIGLUS = {
    kernel: functools.partial(grouped_swiglu, kernel=kernel) for kernel in ("blocks", "ragged_dot")
}


@pytest.mark.parametrize("kernel", SWIGLUS)
@pytest.mark.parametrize("rows", SPLITS.values(), ids=SPLITS)
def test_swiglu_and_its_gradients_are_those_of_a_loop_over_experts(kernel, rows):
    arrays, expert = inputs(), expert_of_rows(rows, 400)
    with jax.default_matmul_precision("highest"):
        (_, y), gradients = sum_of_squares_and_gradients(
            SWIGLUS[kernel], expert, arrays, groups_of(rows)
        )
        (_, expected), expected_gradients = sum_of_squares_and_gradients(
            swiglu_by_loop, expert, arrays, expert
        )
    assert relative_norm(y, expected) < 1e-5
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert relative_norm(got, want) < 1e-5
    for e in range(4):
        if rows[e] == 0:
            assert all(not np.asarray(gradient[e]).any() for gradient in gradients[1:])


@functools.partial(jax.jit, static_argnums=0)
def of_layer(kernel, arrays, layer):
    if kernel == "in stack":
        return swiglu_in_stack(*arrays, layer)
    return swiglu_of_layer(*arrays, kernel, layer)


@pytest.mark.parametrize("kernel", ["blocks", "ragged_dot", "in stack"])
@pytest.mark.parametrize(
    "rows", [(0, 1, 0, 0), (1, 0, 0, 1), (3, 0, 70, 9), (0, 0, 0, 90), (0, 0, 0, 0)], ids=str
)
def test_swiglu_of_a_layer_of_a_stack_is_that_of_its_matrices(kernel, rows):
    R = max(sum(rows), 2)
    x, *weights = inputs(R)
    stack = [jnp.stack([weight + 1, weight, weight - 1]) for weight in weights]
    expert = expert_of_rows(rows, R)
    with jax.default_matmul_precision("highest"):
        arrays, layer = (x, *stack, groups_of(rows)), jnp.int32(1)
        y = of_layer(kernel, arrays, layer)
        expected = swiglu_by_loop(x, *weights, expert)
    assert relative_norm(y[expert >= 0], expected[expert >= 0]) < 1e-5


@pytest.mark.parametrize("kernel", ["blocks", "ragged_dot"])
def test_matmul_and_its_gradients_are_those_of_a_loop_over_experts(kernel):
    x, weight, *_ = inputs()
    rows = (391, 5, 0, 2)
    used = (expert_of_rows(rows, 400) >= 0)[:, None]

    def loss(multiply):
        return lambda x, weight: jnp.sum(jnp.where(used, multiply(x, weight), 0) ** 2)

    def by_loop(x, weight):
        expert = expert_of_rows(rows, 400)
        return sum(jnp.where((expert == e)[:, None], x @ weight[e], 0) for e in range(4))

    kernel_loss = loss(lambda x, w: grouped_matmul(x, w, groups_of(rows), kernel))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.value_and_grad(kernel_loss, argnums=(0, 1)))(x, weight)
        expected = jax.value_and_grad(loss(by_loop), argnums=(0, 1))(x, weight)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_norm(a, b) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["blocks", "ragged_dot"])
def test_three_projections_one_by_one_give_every_bit_of_swiglu_at_once(kernel, dtype):
    groups = groups_of([300, 0, 17, 83])
    x, gate, up, down = (array.astype(dtype) for array in inputs())

    def one_by_one(x, gate, up, down):
        hidden = jax.nn.silu(grouped_matmul(x, gate, groups, kernel)) * grouped_matmul(
            x, up, groups, kernel
        )
        return grouped_matmul(hidden, down, groups, kernel)

    at_once = jax.jit(lambda *arrays: grouped_swiglu(*arrays, groups, kernel))(x, gate, up, down)
    np.testing.assert_array_equal(jax.jit(one_by_one)(x, gate, up, down), at_once)


@pytest.mark.parametrize("balanced_rows", [1, 400, 4000])
@pytest.mark.parametrize("num_rows", [1, 7, 255, 257, 600])
def test_any_number_of_rows_will_do_whatever_was_expected(num_rows, balanced_rows):
    arrays = inputs(num_rows)
    rows = (num_rows // 2, 0, num_rows - num_rows // 2, 0)
    y = jax.jit(blocks.grouped_swiglu)(*arrays, groups_of(rows, balanced_rows))
    expected = swiglu_by_loop(*arrays, expert_of_rows(rows, num_rows))
    assert relative_norm(y, expected) < 1e-5


def test_gradients_of_many_bfloat16_rows_are_summed_in_float32():
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.uniform(size=shape), jnp.bfloat16) for shape in ((16_384, D), (1, D, F))
    )
    dy = jnp.asarray(rng.uniform(size=(len(x), F)), jnp.bfloat16)
    _, pull_back = jax.vjp(
        lambda weight: blocks.grouped_matmul(x, weight, groups_of([len(x)], len(x))), weight
    )
    expected = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    (dweight,) = pull_back(dy)
    # Rounded once; 64 blocks summed in bfloat16 are off by 6e-3.
    assert relative_norm(dweight[0].astype(jnp.float32), expected) < 3e-3
