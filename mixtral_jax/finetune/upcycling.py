"""Makes experts from a dense layer: copies of it or of its slices, plain, noisy or partly redrawn.

`checkpoint.upcycled` provides the copies. This module changes them on the mesh, one layer at a
time, on the devices that hold them. The random numbers do not depend on the mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from mixtral_jax.config import Config, UpcycleConfig
from mixtral_jax.model.moe import Experts
from mixtral_jax.model.router import Router
from mixtral_jax.model.transformer import Transformer

# Differs from the streams in `finetune.adapters` and `training`, so the random numbers differ too.
_UPCYCLE_STREAM = 3

_ROUTER_VARIABLES = nnx.PathContains("router")


def without_routers(model: Transformer) -> nnx.State:
    """All variables of a model except those of its routers, which a dense model does not have."""
    return nnx.state(model, nnx.Not(_ROUTER_VARIABLES))


def upcycle(copies: nnx.State, fresh: Transformer, config: Config) -> Transformer:
    """The model that an upcycled run starts from. Call it under `jax.jit`.

    Args:
        copies: `without_routers` of the model; each expert is a copy of the dense layer, or of one
            slice of it.
        fresh: a newly initialised model; only its routers are used.
        config: the run's config.
    """
    settings = config.upcycle
    assert settings is not None
    graphdef, routers, _ = nnx.split(fresh, _ROUTER_VARIABLES, ...)
    model = nnx.merge(graphdef, routers, copies)
    moe = model.blocks.moe
    tie_slices(moe.router, settings.granularity)
    scale = settings.scale(config.router) or 1.0
    if settings.method == "copy" and scale == 1:
        return model  # The copies stay equal to the dense layer, bit for bit.
    key = jax.random.fold_in(jax.random.key(config.train.seed), _UPCYCLE_STREAM)
    keys_L = jax.random.split(key, config.model.num_layers)
    moe.experts = jax.lax.map(
        lambda layer: _change(layer[0], layer[1], settings, scale), (moe.experts, keys_L)
    )
    return model


def tie_slices(router: Router, num_slices: int) -> None:
    """Gives all slices of a copy the gate column of the first, so that a token uses all or none.

    These are the virtual groups of arXiv 2410.07524. The gradients of the slices differ, so the
    columns become different from the first step on.
    """
    gate_LDE = router.gate.weight[...]
    first_LDC1 = gate_LDE.reshape(*gate_LDE.shape[:2], -1, num_slices)[..., :1]
    tied_LDCS = jnp.broadcast_to(first_LDC1, (*first_LDC1.shape[:3], num_slices))
    router.gate.weight = nnx.Param(tied_LDCS.reshape(gate_LDE.shape))


def _change(experts: Experts, key: jax.Array, settings: UpcycleConfig, scale: float) -> Experts:
    """Applies the method to the experts of one layer, and multiplies their outputs by `scale`."""
    key_of_units, *keys = jax.random.split(key, 4)
    projections = (experts.gate, experts.up, experts.down)
    E, _, F = experts.gate.weight.shape
    is_new_EF = choose_units(key_of_units, E, F, settings.drop_fraction)
    for projection, key_of_weight in zip(projections, keys, strict=True):
        weight = projection.weight[...]
        changed = weight.astype(jnp.float32)
        if settings.method == "noise":
            changed += settings.noise_std * jnp.std(changed) * _normal(key_of_weight, changed)
        elif settings.method == "drop":
            spec = jax.typeof(weight).sharding.spec
            hidden = projection.axes.index("mlp")
            is_new = jax.reshard(is_new_EF, P(spec[0], spec[hidden]))
            changed = redraw(changed, jnp.expand_dims(is_new, 3 - hidden), key_of_weight)
        changed = scale * changed if projection is experts.down else changed
        projection.weight = nnx.Param(changed.astype(weight.dtype))
    return experts


def choose_units(key: jax.Array, E: int, F: int, fraction: float) -> jax.Array:
    """Chooses floor(fraction * F) hidden units of each expert at random; [E, F] bool."""
    shuffled_EF = jnp.argsort(jax.random.uniform(key, (E, F)), axis=-1)
    return shuffled_EF < int(fraction * F)


def redraw(weight: jax.Array, is_new: jax.Array, key: jax.Array) -> jax.Array:
    """Draws the weights of new units from a normal distribution.

    Its mean and standard deviation are those of the weights that it replaces, per expert
    (Drop-Upcycling, arXiv 2502.19261, section 3).

    Args:
        weight: [E, D, F] or [E, F, D], float32.
        is_new: [E, 1, F] or [E, F, 1], true for new units.
    """

    def mean(values: Any) -> jax.Array:
        return jnp.sum(jnp.where(is_new, values, 0), axis=(1, 2), keepdims=True) / count_E11

    D = weight.size // is_new.size
    count_E11 = jnp.maximum(D * jnp.sum(is_new, axis=(1, 2), keepdims=True), 1)
    mean_E11 = mean(weight)
    deviation_E11 = jnp.sqrt(mean(jnp.square(weight - mean_E11)))
    return jnp.where(is_new, mean_E11 + deviation_E11 * _normal(key, weight), weight)


def _normal(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.normal(
        key, like.shape, jnp.float32, out_sharding=jax.typeof(like).sharding.spec
    )
