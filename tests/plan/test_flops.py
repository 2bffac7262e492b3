"""FLOPs equal counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from mixtral_jax.plan.flops import count_program_flops, count_traced_flops
from mixtral_jax.plan.hlo import parse_program
from tests.plan.programs import convolutions


def test_matmuls_that_are_written_as_convolutions_count_as_matmuls() -> None:
    attended = 2 * 8 * 4 * 4096 * 4096 * 128  # 32 heads, 4096 x 4096 weights, 128 numbers a head
    projected = 2 * 4096 * 4096 * 32 * 128
    assert count_program_flops(convolutions(), routed_rows=0) == attended + projected


def test_a_compiled_loop_of_matmuls_counts_every_turn() -> None:
    step = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
    program = parse_program(
        step.lower(jnp.ones((16, 32)), jnp.ones((5, 32, 32))).compile().as_text()
    )
    assert count_program_flops(program, routed_rows=0) == 5 * 2 * 16 * 32 * 32


def test_what_nothing_uses_is_not_counted() -> None:
    traced = jax.make_jaxpr(lambda x: (x @ x, jnp.sin(x))[1])(jnp.ones((8, 8)))
    assert count_traced_flops(traced, routed_rows=0) == 0


def test_a_grouped_matmul_counts_the_rows_of_a_balanced_routing() -> None:
    x_RD, weight_EDF, sizes_E = jnp.ones((64, 16)), jnp.ones((4, 16, 8)), jnp.array([4, 4, 4, 4])
    traced = jax.make_jaxpr(jax.lax.ragged_dot)(x_RD, weight_EDF, sizes_E)
    assert count_traced_flops(traced, routed_rows=16) == 2 * 16 * 16 * 8
    assert count_traced_flops(traced, routed_rows=1000) == 2 * 64 * 16 * 8

    def loss(x_RD, weight_EDF):
        return jnp.sum(jax.lax.ragged_dot(x_RD, weight_EDF, sizes_E))

    both = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x_RD, weight_EDF)
    # The value of the loss is not used, so the forward matmul does not count.
    assert count_traced_flops(both, routed_rows=16) == 2 * 2 * 16 * 16 * 8


def test_a_loop_of_unknown_length_with_matmuls_is_an_error() -> None:
    traced = jax.make_jaxpr(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x))(
        3, jnp.ones((8, 8))
    )
    with pytest.raises(ValueError, match="ragged_dot"):
        count_traced_flops(traced, routed_rows=0)


@pytest.mark.parametrize(("estimate", "expected"), [(None, 4 * 2 * 8 * 16 * 8), (99, 99)])
def test_a_pallas_kernel_counts_by_its_estimate_or_its_grid(
    estimate: int | None, expected: int
) -> None:
    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] @ y_ref[...]

    cost = estimate and pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0)
    call = pl.pallas_call(
        kernel,
        grid=(4,),
        cost_estimate=cost,
        out_shape=jax.ShapeDtypeStruct((32, 8), np.float32),
        in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
    )
    traced = jax.make_jaxpr(lambda x, y: call(x @ jnp.ones((16, 16)), y))(
        jnp.ones((32, 16)), jnp.ones((16, 8))
    )
    assert count_traced_flops(traced, routed_rows=0, only_pallas=True) == expected
