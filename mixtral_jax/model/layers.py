"""The small parts of a block: projection, norm, rotary embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from mixtral_jax.config import ModelConfig
from mixtral_jax.parallel.rules import AxisRules


class Projection(nnx.Module):
    """An einsum with one weight, sharded at birth: how dense parts of the model multiply by a
    parameter.

    `axes` are the logical axes of the weight. Its shards are gathered, in the compute dtype, right
    before use. `init` draws the weight, by default from the config's normal distribution;
    `variable` is the kind of parameter.
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
        # A float32 projection in a bfloat16 model (the router) must not be computed in bfloat16
        # passes.
        precision = "highest" if self.dtype == "float32" else None
        return jnp.einsum(self.equation, x, weight, precision=precision, out_sharding=out_sharding)

    def input_weights(self) -> tuple[nnx.Variable, ...]:
        """The variables that multiply this projection's input."""
        return (self.weight,)


def gather_weight(weight: jax.Array, axes: tuple[str | None, ...], rules: AxisRules) -> jax.Array:
    """A dense weight as `rules.gathered` lays it out, for each device to use on its own tokens.

    `reduced` says that other devices use it on other tokens, so that its gradient stays a sum yet
    to be made. In two steps, since XLA scatters a sum over some of its mesh axes, but makes one
    over all of them whole: the transpose is a reduce-scatter over `fsdp`, and then a sum of those
    shards over the other axes.
    """
    stored, whole = rules.spec(*axes), rules.gathered(*axes)
    if stored == whole:
        return weight
    over_fsdp = rules.spec(*("embed" if axis == "dense_embed" else axis for axis in axes))
    tokens = frozenset(jax.tree.leaves(rules.batch))
    weight = jax.reshard(weight, P(*over_fsdp, reduced=tokens - {"fsdp"}))
    return jax.reshard(weight, P(*whole, reduced=tokens))


class RMSNorm(nnx.Module):
    """Root-mean-square norm: in float32, cast, and only then scaled, as Mixtral does (arXiv
    1910.07467).
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
    """Rotary position embedding, in float32: pairs are (h, h + H/2), as in Hugging Face
    checkpoints.

    Source: RoFormer (arXiv 2104.09864), eq. 34, with base `theta`.
    """
    H = x_BTNH.shape[-1]
    frequency_h = theta ** -(jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle_BTh = positions_BT[..., None].astype(jnp.float32) * frequency_h[None, None]
    sin_BT1h, cos_BT1h = jnp.sin(angle_BTh)[:, :, None], jnp.cos(angle_BTh)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
