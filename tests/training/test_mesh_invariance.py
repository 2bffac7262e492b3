"""The main test: the same losses, gradients and routes on every mesh, with and without capacity."""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests.cases import mesh_of, on_mesh, packed_batch, relative_norm, small_config
from tests.training.steps import initial_state, prepare

STEPS = 12
MESHES = {
    "data=8": {"data": 8},
    "expert=8": {"expert": 8},
    "expert=4,fsdp=2": {"expert": 4, "fsdp": 2},
    "fsdp=2,expert=2,tensor=2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data=2,expert=2,tensor=2": {"data": 2, "expert": 2, "tensor": 2},
}


# What `make test` runs; `make test-meshes` runs the rest of the product.
MAIN_CASES = (
    ("fsdp=2,expert=2,tensor=2", "dropless"),
    ("expert=4,fsdp=2", "capacity 1.25"),
)


def cases():
    """Each mesh without a capacity and with one."""
    capacities = {"dropless": None, "capacity 1.25": 1.25}
    for mesh, name in itertools.product(MESHES, capacities):
        marks = () if (mesh, name) in MAIN_CASES else pytest.mark.meshes
        yield pytest.param(MESHES[mesh], capacities[name], id=f"{mesh}-{name}", marks=marks)


@functools.cache
def trajectory(capacity_factor, **sizes):
    """Losses, loads and drops of 12 steps, the first gradients, the first and last routes."""
    config = small_config(
        dispatch__capacity_factor=capacity_factor, dispatch__grouped_matmul="blocks"
    )
    mesh, prepared = mesh_of(**sizes), prepare(config)

    @jax.jit
    def route(state, batch):
        micro = jax.tree.map(lambda rows: rows[0], batch)
        return state.model()(micro.tokens, micro.positions, micro.segment_ids).routing.experts_BTA

    losses, gradients, routes, loads, dropped = [], None, [], [], []
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        # It is enough to make the state on each mesh once.
        state = initial_state(config, mesh) if capacity_factor else prepared.init()
        host_batch = packed_batch(config)
        batch = on_mesh(host_batch, mesh)
        routes.append(np.asarray(route(state, batch)))
        for _ in range(STEPS):
            state, metrics = prepared.training.train_step(state, batch)
            losses.append(
                {name: float(metrics[name]) for name in ("loss", "total_loss", "load_balance_loss")}
            )
            dropped.append(float(metrics["router/dropped_fraction"]))
            loads.append([metrics[f"router/layer_{layer:02d}/load"] for layer in range(2)])
            gradients = gradients or jax.device_get(
                jax.tree.flatten_with_path(state.opt_state[0])[0]
            )
        routes.append(np.asarray(route(state, batch)))
    real = host_batch.segment_ids[0] > 0
    return losses, gradients, [chosen[:, real] for chosen in routes], np.array(loads), dropped


@pytest.mark.parametrize(("sizes", "capacity_factor"), list(cases()))
def test_losses_gradients_and_routes_are_the_same_on_every_mesh(sizes, capacity_factor):
    losses, gradients, routes, loads, dropped = trajectory(capacity_factor, **sizes)
    expected_losses, expected_gradients, expected_routes, expected_loads, expected_dropped = (
        trajectory(capacity_factor)
    )
    assert dropped == expected_dropped
    assert (min(dropped) > 0) == (capacity_factor is not None)
    for got, expected in zip(losses, expected_losses, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    for (path, got), (_, expected) in zip(gradients, expected_gradients, strict=True):
        assert relative_norm(got, expected) < 1e-5, jax.tree_util.keystr(path)
    # A near-tie may flip late; at step 1 none may.
    np.testing.assert_array_equal(loads[0], expected_loads[0])
    np.testing.assert_allclose(loads, expected_loads, atol=0.005)
    np.testing.assert_array_equal(routes[0], expected_routes[0])
    assert np.mean(routes[1] == expected_routes[1]) >= 0.999
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.005  # It did learn.
