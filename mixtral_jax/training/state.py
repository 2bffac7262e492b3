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
    """Parameters, split into trained and frozen ones, and the optimizer's state.

    Attributes:
        trained: the variables that have a gradient.
        frozen: all others. In pretraining there are none but balance biases, which steps move
            without a gradient.
        recent_load_LE: the running load of each expert, used only for metrics.
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
        """The state of a `Transformer` before the first step; `trainable` filters what learns."""
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
    base: nnx.Module | None = None,
) -> TrainState:
    """Makes a fresh state, whose arrays are sharded over the mesh in force from the start.

    No array is ever whole on a host.

    Args:
        base: what `make_model` makes the model of; its arrays are donated. None calls
            `make_model` without an argument.
    """
    if base is None:
        return jax.jit(lambda: TrainState.create(make_model(), optimizer, trainable))()
    create = jax.jit(
        lambda base: TrainState.create(make_model(base), optimizer, trainable), donate_argnums=0
    )
    return create(base)


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
