"""The balance loss undoes a router that sends nearly everything to two experts; without it nothing
does.
"""

import jax
import numpy as np
import pytest

from tests.cases import mesh_of, on_mesh, packed_batch, small_config
from tests.skew import prefer_experts
from tests.training.steps import prepare

STEPS = 100


def max_violations(weight):
    """The maximal violation of each step; the first sends nearly every token to two experts."""
    config = small_config(
        router__load_balance__weight=weight,
        optimizer__learning_rate=3e-3,
        train__num_steps=STEPS,
        dispatch__grouped_matmul="blocks",  # Faster for a hundred steps.
        train__batch_size=8,
        train__sequence_length=64,
    )
    mesh, prepared, history = mesh_of(), prepare(config), []
    with jax.set_mesh(mesh):
        state = prepared.init()
        gate = state.trained.blocks.moe.router.gate.weight
        prefer_experts(gate, 0.6 * (np.arange(8) < 2), state.trained.embedding_VD)
        for number in range(STEPS):
            batch = on_mesh(packed_batch(config, seed=number), mesh)
            state, metrics = prepared.training.train_step(state, batch)
            history.append(float(metrics["router/max_violation"]))
            if number == 0:  # The premise: nearly every route goes to the two.
                assert metrics["router/load"][:2].sum() >= 0.9
    return history


@pytest.mark.parametrize(("weight", "recovers"), [(10.0, True), (0.0, False)])
def test_the_loss_evens_out_a_collapsed_router(weight, recovers):
    history = max_violations(weight)
    violation = np.mean(history[-20:])
    assert violation < 0.5 if recovers else violation > 2, history[::10]
