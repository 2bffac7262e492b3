"""Rows in chunks give what rows at once give, whatever the routing, and no work where there are
none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.chunks import apply_in_chunks, count_balanced_chunks
from mixtral_jax.kernels.groups import RowGroups, weigh
from tests.cases import relative_norm

R, D, F, E = 10_000, 6, 5, 3
# Chunks of 1,050 rows, or of 1,024 rows of one expert. The last of 10,000 rows is not full.
BALANCED = 4200
ROUTINGS = {
    "balanced": (1500, 1200, 1500),
    "a chunk exactly": (1050, 0, 0),
    "a chunk of one expert exactly": (0, 1024, 0),
    "one row more": (1, 1025, 0),
    "full": (5000, 0, 5000),
    "all to one": (0, R, 0),
    "empty": (0, 0, 0),
}


def project(weight_EDF: jax.Array, rows: dict[str, jax.Array], groups: RowGroups) -> jax.Array:
    x_CF = jax.lax.ragged_dot(rows["x"], weight_EDF, groups.rows_per_expert_E)
    return weigh(jnp.sin(x_CF), rows["weight"], groups)


def inputs() -> tuple[jax.Array, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    weight, x, weights_of_routes = (rng.normal(size=shape) for shape in ((E, D, F), (R, D), (R, 1)))
    rows = {"x": jnp.asarray(x, jnp.float32), "weight": jnp.asarray(weights_of_routes, jnp.float32)}
    return jnp.asarray(weight, jnp.float32), rows


@pytest.mark.parametrize("by_expert", [True, False])
@pytest.mark.parametrize("rows_per_expert", ROUTINGS.values(), ids=ROUTINGS)
def test_values_and_gradients_are_those_of_all_rows_at_once(
    rows_per_expert: tuple[int, ...], by_expert: bool
) -> None:
    groups, used = RowGroups(jnp.asarray(rows_per_expert), BALANCED), sum(rows_per_expert)

    def loss(apply):
        return lambda weight, rows: (
            jnp.sum(apply(weight, rows, groups) ** 2),
            apply(weight, rows, groups),
        )

    def in_chunks(weight, rows, groups):
        return apply_in_chunks(project, by_expert, weight, rows, groups)

    with jax.default_matmul_precision("highest"):
        got, expected = (
            jax.jit(jax.grad(loss(apply), argnums=(0, 1), has_aux=True))(*inputs())
            for apply in (in_chunks, project)
        )
    (dweight, drows), y = got
    (expected_dweight, expected_drows), expected_y = expected
    assert relative_norm(y, expected_y) < 1e-6 if used else not np.any(y)
    assert relative_norm(dweight, expected_dweight) < 1e-6 if used else not np.any(dweight)
    for name, gradient in expected_drows.items():
        assert not used or relative_norm(drows[name][:used], gradient[:used]) < 1e-5


def test_chunks_without_rows_are_not_computed() -> None:
    computed = []

    def note(weight, rows, groups):
        jax.debug.callback(
            lambda count: computed.append(int(count)), jnp.sum(groups.rows_per_expert_E)
        )
        return project(weight, rows, groups)

    weight, rows = inputs()
    jax.block_until_ready(
        apply_in_chunks(note, True, weight, rows, RowGroups(jnp.array([1100, 0, 1100]), BALANCED))
    )
    jax.effects_barrier()
    assert sorted(computed) == [100, 1050, 1050]


def test_gradients_of_many_bfloat16_chunks_are_summed_in_float32() -> None:
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.uniform(size=(65_536, width)), jnp.bfloat16) for width in (D, F))
    groups = RowGroups(jnp.array([65_536]), balanced_rows=1024)  # 64 chunks.
    weight = jnp.zeros((1, D, F), jnp.bfloat16)

    def multiply(weight, rows, groups):
        return jax.lax.ragged_dot(rows, weight, groups.rows_per_expert_E)

    _, pull_back = jax.vjp(
        lambda weight: apply_in_chunks(multiply, True, weight, x, groups), weight
    )
    expected = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    (dweight,) = pull_back(dy)
    assert relative_norm(dweight[0].astype(jnp.float32), expected) < 3e-3


def test_how_often_a_loop_runs_is_read_from_its_name() -> None:
    groups = RowGroups(jnp.array([1, 2, 3]), BALANCED)
    traced = jax.make_jaxpr(lambda *arrays: apply_in_chunks(project, True, *arrays, groups))
    (loop,) = (
        eqn
        for eqn in jax.tree.leaves(traced(*inputs()).jaxpr.eqns)
        if eqn.primitive.name == "custom_vjp_call"
    )
    (loop,) = (eqn for eqn in loop.params["call_jaxpr"].jaxpr.eqns if eqn.primitive.name == "while")
    assert count_balanced_chunks(str(loop.source_info.name_stack)) == 4
    assert count_balanced_chunks("jit(step)/while") is None
