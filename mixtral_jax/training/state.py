"""Everything that a step changes and a checkpoint holds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from jax import P


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, split into those that learn and the rest, and the optimizer's state for the
    first.

    `frozen` is empty in pretraining, but for what steps move without a gradient: balance biases.
    `recent_load_LE` is the routes to each expert of late, for metrics alone.
    """

    step: jax.Array
    trained: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState
    recent_load_LE: jax.Array
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, model: Any, optimizer: optax.GradientTransformation, trainable: Filter = nnx.Param
    ) -> "TrainState":
        """The state of a `Transformer` before the first step; variables that `trainable` lets
        through will learn.
        """
        graphdef, trained, frozen = nnx.split(model, trainable, ...)
        load_LE = jnp.zeros((model.config.num_layers, model.config.num_experts))
        return cls(
            jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained), load_LE, graphdef
        )

    def model(self) -> nnx.Module:
        """The model with its current parameters."""
        return nnx.merge(self.graphdef, self.trained, self.frozen)


def init_state(
    make_model: Callable[..., nnx.Module],
    optimizer: optax.GradientTransformation,
    trainable: Filter = nnx.Param,
    *bases: nnx.Module,
) -> TrainState:
    """A fresh state whose arrays are born sharded on the mesh in force; none is ever whole on a
    host.

    `bases` are models that `make_model` takes to make another of them; their arrays are given up to
    it.
    """

    def create(*bases: nnx.Module) -> TrainState:
        return TrainState.create(make_model(*bases), optimizer, trainable)

    return jax.jit(create, donate_argnums=range(len(bases)))(*bases)


def abstract_state(
    make_model: Callable[[], nnx.Module],
    optimizer: optax.GradientTransformation,
    trainable: Filter = nnx.Param,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, without allocating: what a restore fills."""
    mesh = jax.sharding.get_mesh()

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else P()  # Scalars carry none.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda: TrainState.create(make_model(), optimizer, trainable))
    return jax.tree.map(with_sharding, shapes)
