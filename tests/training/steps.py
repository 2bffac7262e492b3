"""Train steps of small models, compiled once for each config and mesh, and shared by tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixtral_jax.config import Config
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.state import TrainState
from tests.cases import mesh_of, on_mesh


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How a config trains, and its jitted `init`. The optimizer remembers the last gradients."""

    training: Training
    init: Callable[[], TrainState]


def remember_gradients() -> optax.GradientTransformation:
    """An optimizer stage whose state is the gradient that it saw."""
    return optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p), lambda grads, *_: (grads, grads)
    )


@functools.cache
def prepare(config: Config) -> Prepared:
    """Compiling takes seconds, so tests that start from the same config share its step."""
    training = make_training(config, "cpu")
    optimizer = optax.chain(remember_gradients(), training.optimizer)
    training = dataclasses.replace(training, optimizer=optimizer)
    return Prepared(training, jax.jit(training.init))


@functools.cache
def _make_state(config: Config) -> TrainState:
    with jax.set_mesh(mesh_of()):
        return prepare(config).init()


def initial_state(config: Config, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """The state before the first step on a mesh (None: one device), as a copy that may be donated.

    It is made on one device and moved, which is faster than made on the mesh.
    """
    # The size of a micro-batch does not change it.
    train = dataclasses.replace(config.train, gradient_accumulation=1)
    state = _make_state(dataclasses.replace(config, train=train))
    if mesh is None or mesh.size == 1:
        return jax.tree.map(jnp.copy, state)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, prepare(config).training.abstract_state())
    return jax.device_put(jax.device_get(state), places)


def train(
    config: Config,
    batch: Batch,
    sizes: dict[str, int],
    steps: int = 1,
    change: Callable[[Any], Any] = lambda state: state,
) -> tuple[TrainState, dict[str, Any]]:
    """The state after some steps on one batch, and the last metrics; on a mesh of these sizes."""
    mesh, prepared = mesh_of(**sizes), prepare(config)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        state = change(initial_state(config, mesh))
        for _ in range(steps):
            state, metrics = prepared.training.train_step(state, on_mesh(batch, mesh))
        return jax.device_get((state, metrics))


def gradients_of(state: TrainState) -> dict[str, np.ndarray]:
    """The gradients of the last step by the paths of their parameters."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.flatten_with_path(state.opt_state[0])[0]
    }


def in_micro_batches(config: Config, batch: Batch) -> tuple[Config, Batch]:
    """The same step taken in four micro-batches of two rows."""
    train = dataclasses.replace(config.train, gradient_accumulation=4)
    rows = jax.tree.map(lambda rows: rows.reshape(4, 2, -1), batch)
    return dataclasses.replace(config, train=train), rows
