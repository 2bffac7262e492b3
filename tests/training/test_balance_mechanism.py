"""The balance loss undoes a router that sends nearly everything to two experts; without it nothing
does.
"""

import functools

import jax
import numpy as np
import pytest

from mixtral_jax.training.assemble import make_training
from mixtral_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.training.state import init_state
from mixtral_jax.training.step import make_train_step
from tests.cases import cpu_model_maker, mesh_of, on_mesh, packed_batch, small_config
from tests.skew import prefer_experts

STEPS = 200


def skewed_model(config):
    """A model whose router sends nearly every token to the first two experts."""
    model = cpu_model_maker(config)()
    offsets_E = 0.6 * (np.arange(config.model.num_experts) < 2)
    prefer_experts(model.blocks.moe.router.gate.weight, offsets_E, model.embedding_VD)
    return model


def max_violations(weight):
    config = small_config(
        router__load_balance__weight=weight,
        optimizer__learning_rate=3e-3,
        train__num_steps=STEPS,
        train__batch_size=8,
        train__sequence_length=64,
    )
    mesh = mesh_of(expert=8)
    schedule = learning_rate_schedule(config.optimizer, STEPS)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_train_step(optimizer, config.router, schedule, make_training(config, "cpu").perturb)
    history = []
    with jax.set_mesh(mesh):
        state = init_state(functools.partial(skewed_model, config), optimizer)
        for number in range(STEPS):
            state, metrics = step(state, on_mesh(packed_batch(config, seed=number), mesh))
            history.append(float(metrics["router/max_violation"]))
            if number == 0:  # The premise: nearly every route goes to the two.
                assert metrics["router/load"][:2].sum() >= 0.9
    return history


@pytest.mark.parametrize(("weight", "recovers"), [(1.0, True), (0.0, False)])
def test_the_loss_evens_out_a_collapsed_router(weight, recovers):
    history = max_violations(weight)
    violation = np.mean(history[-20:])
    assert violation < 0.5 if recovers else violation > 2, history[::10]
