"""The small parts of a block: projection, norm, rotary embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from mixtral_jax.config import ModelConfig
from mixtral_jax.parallel.rules import AxisRules


class Projection(nnx.Module):
    """An einsum with one weight: how dense parts of the model multiply by a parameter.

    The weight is sharded from the start, and its shards are gathered in the compute dtype right
    before use.

    Args:
        equation: the einsum of input and weight, such as `BTD,DNH->BTNH`.
        shape: the shape of the weight.
        axes: the logical axis of each dimension of the weight.
        dtype: the dtype of the computation; by default that of the config.
        init: draws the weight; by default from the config's normal distribution.
        variable: the kind of parameter that the weight is.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        config: ModelConfig,
        rules: AxisRules,
        rngs: nnx.Rngs,
        dtype: str | None = None,
        init: nnx.Initializer | None = None,
        variable: type[nnx.Param] = nnx.Param,
    ):
        self.equation = equation
        self.axes = axes
        self.rules = rules
        self.dtype = dtype or config.dtype
        init = init or nnx.initializers.normal(config.initializer_range)
        weight = init(rngs.params(), shape, config.param_dtype, out_sharding=rules.spec(*axes))
        self.weight = variable(weight)

    def __call__(self, x: jax.Array, out_sharding: P) -> jax.Array:
        weight = gather_weight(self.weight[...].astype(self.dtype), self.axes, self.rules)
        # A float32 projection in a bfloat16 model, such as the router, must not be computed in
        # bfloat16 passes.
        precision = "highest" if self.dtype == "float32" else None
        return jnp.einsum(self.equation, x, weight, precision=precision, out_sharding=out_sharding)

    def input_weights(self) -> tuple[nnx.Variable, ...]:
        """The variables that multiply this projection's input."""
        return (self.weight,)


def gather_weight(weight: jax.Array, axes: tuple[str | None, ...], rules: AxisRules) -> jax.Array:
    """Lays out a dense weight as `rules.gathered`, for each device to use on its own tokens.

    `reduced` tells jax that each device uses the weight on its own tokens, so the gradient must
    still be summed over devices. The weight is gathered in two steps. The transpose is then a
    reduce-scatter over `fsdp`, followed by a sum of those shards over the other axes. In one step,
    XLA would sum over all axes first and scatter nothing.
    """
    stored, whole = rules.spec(*axes), rules.gathered(*axes)
    if stored == whole:
        return weight
    over_fsdp = rules.spec(*("embed" if axis == "dense_embed" else axis for axis in axes))
    tokens = frozenset(jax.tree.leaves(rules.batch))
    weight = jax.reshard(weight, P(*over_fsdp, reduced=tokens - {"fsdp"}))
    return jax.reshard(weight, P(*whole, reduced=tokens))


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467).

    It is computed in float32, cast, and only then scaled, as in Mixtral.
    """

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_eps
        self.dtype = config.dtype
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD.astype(jnp.float32)
        mean_square_BT1 = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        normed_BTD = x_BTD * jax.lax.rsqrt(mean_square_BT1 + self.epsilon)
        return normed_BTD.astype(self.dtype) * self.scale[...].astype(self.dtype)[None, None]


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, in float32 (RoFormer, arXiv 2104.09864, eq. 34, base `theta`).

    It rotates the pairs (h, h + H/2), as Hugging Face checkpoints expect.
    """
    H = x_BTNH.shape[-1]
    frequency_h = theta ** -(jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle_BTh = positions_BT[..., None].astype(jnp.float32) * frequency_h[None, None]
    sin_BT1h, cos_BT1h = jnp.sin(angle_BTh)[:, :, None], jnp.cos(angle_BTh)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
