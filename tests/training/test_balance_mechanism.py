"""The balance loss undoes a router that sends nearly everything to two experts; without it nothing
does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.training.assemble import make_training
from mixtral_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.training.state import init_state
from mixtral_jax.training.step import make_train_step
from tests.cases import cpu_model_maker, mesh_of, on_mesh, packed_batch, small_config

STEPS = 200


class OffsetGate(nnx.Module):
    """A gate whose first two experts start ahead by a fixed amount, which no gradient reaches."""

    def __init__(self, gate, offset):
        self.gate, self.offset = gate, offset

    def __call__(self, x_BTD, out_sharding):
        logits_BTE = self.gate(x_BTD, out_sharding)
        return (
            logits_BTE
            + jnp.where(jnp.arange(logits_BTE.shape[-1]) < 2, self.offset, 0.0)[None, None]
        )


def offset_model(config):
    model = cpu_model_maker(config)()

    def offset(block):
        block.moe.router.gate = OffsetGate(block.moe.router.gate, 3.0)
        return block

    model.blocks = jax.vmap(offset)(model.blocks)
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
        state = init_state(functools.partial(offset_model, config), optimizer)
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
