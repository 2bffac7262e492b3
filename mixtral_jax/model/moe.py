"""The mixture of experts: route, dispatch, compute, combine; and the experts that need no route."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.config import DispatchConfig, ModelConfig, RouterConfig
from mixtral_jax.kernels.chunks import apply_in_chunks
from mixtral_jax.kernels.grouped_matmul import (
    Kernel,
    grouped_matmul,
    grouped_swiglu,
    swiglu_of_layer,
)
from mixtral_jax.kernels.groups import RowGroups, weigh
from mixtral_jax.model.dispatch.choose import TRANSPORTS
from mixtral_jax.model.dispatch.region import dispatch
from mixtral_jax.model.router import Router, Routing
from mixtral_jax.model.shared_experts import SharedExperts
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules


class ExpertProjection(nnx.Module):
    """One matrix per expert; multiplies rows that are sorted by expert.

    `init`, `variable`: as of `Projection`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str | None, str | None, str | None],
        kernel: Kernel,
        *,
        config: ModelConfig,
        rules: AxisRules,
        rngs: nnx.Rngs,
        init: nnx.Initializer | None = None,
        variable: type[nnx.Param] = nnx.Param,
    ):
        self.axes = axes
        self.rules = rules
        self.kernel: Kernel = kernel
        init = init or nnx.initializers.normal(config.initializer_range)
        self.weight = variable(
            init(rngs.params(), shape, config.param_dtype, out_sharding=rules.spec(*axes))
        )

    def __call__(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        return grouped_matmul(x_RD, self.weight[...], groups, self.kernel)


class Experts(nnx.Module):
    """SwiGLU experts (arXiv 2002.05202) on contiguous rows, times the weights of their routes.

    Each projection may be replaced by another callable on (x_RD, groups). Where all three are
    plain, `blocks` runs them at once.
    """

    def __init__(self, config: ModelConfig, kernel: Kernel, rules: AxisRules, rngs: nnx.Rngs):
        D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
        shared = {"config": config, "rules": rules, "rngs": rngs}
        self.kernel: Kernel = kernel
        self.gate = ExpertProjection((E, D, F), ("expert", "embed", "mlp"), kernel, **shared)
        self.up = ExpertProjection((E, D, F), ("expert", "embed", "mlp"), kernel, **shared)
        self.down = ExpertProjection((E, F, D), ("expert", "mlp", "embed"), kernel, **shared)

    def __call__(self, x_RD: jax.Array, weight_R1: jax.Array, groups: RowGroups) -> jax.Array:
        if self.kernel == "blocks":
            return weigh(self._run_blocks(x_RD, groups), weight_R1, groups)
        rows = (x_RD, weight_R1)
        if len(x_RD) > groups.balanced_rows:
            return apply_in_chunks(Experts._apply, self, rows, groups)
        return self._apply(rows, groups)

    def plain_weights(self) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """Those of gate, up and down, unless one is no plain projection."""
        projections = (self.gate, self.up, self.down)
        if any(type(projection) is not ExpertProjection for projection in projections):
            return None
        gate_EDF, up_EDF, down_EFD = (projection.weight[...] for projection in projections)
        return gate_EDF, up_EDF, down_EFD

    def _run_blocks(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        if weights := self.plain_weights():
            return grouped_swiglu(x_RD, *weights, groups, self.kernel)
        return self.down(self._hidden(x_RD, groups), groups)

    def _apply(self, rows: tuple[jax.Array, jax.Array], groups: RowGroups) -> jax.Array:
        """Weighs what goes into `down`: for the gradient of a route's weight, nobody has to know
        what comes out.
        """
        x_RD, weight_R1 = rows
        return self.down(weigh(self._hidden(x_RD, groups), weight_R1, groups), groups)

    def _hidden(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        return jax.nn.silu(self.gate(x_RD, groups)) * self.up(x_RD, groups)


class ExpertsOfLayer(nnx.Module):
    """The experts of one layer of a stack, for a few rows and no gradient: weights are read where
    they lie.
    """

    def __init__(self, stack: Experts, layer: jax.Array):
        self.stack = stack
        self.layer = nnx.data(layer)
        self.kernel: Kernel = stack.kernel

    def __call__(self, x_RD: jax.Array, weight_R1: jax.Array, groups: RowGroups) -> jax.Array:
        if weights := self.stack.plain_weights():
            return weigh(
                swiglu_of_layer(x_RD, *weights, groups, self.kernel, self.layer), weight_R1, groups
            )
        return jax.tree.map(lambda weight: weight[self.layer], self.stack)(x_RD, weight_R1, groups)


class MoE(nnx.Module):
    """Sparse mixture of experts (Mixtral, arXiv 2401.04088, section 2.1).

    `dispatch` leaves nothing to `auto`.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.num_experts = config.num_experts
        self.dtype = config.dtype
        self.rules = rules
        self.router = Router(config, router, dispatch, rules, rngs)
        self.experts = Experts(config, cast(Kernel, dispatch.grouped_matmul), rules, rngs)
        self.transport = TRANSPORTS[dispatch.transport](config.num_experts, dispatch.buffer_factor)
        # Last: random numbers are drawn in order, so that all other parameters start as they would
        # without them.
        self.shared_experts = (
            SharedExperts(config, rules, rngs) if config.num_shared_experts else None
        )

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Routing]:
        routing = self.router(x_BTD, tokens)
        # Cast before the gather: weights travel in the compute dtype.
        experts = jax.tree.map(self._cast, self.experts)
        routes = (routing.experts_BTA, routing.weights_BTA, routing.is_kept_BTA)
        is_checked = self.experts.kernel != "tokamax"
        home = dispatch(
            experts,
            self.transport,
            self.num_experts,
            x_BTD,
            routes,
            self.rules,
            is_checked=is_checked,
        )
        y_BTD = home.y_BTD + self.shared_experts(x_BTD) if self.shared_experts else home.y_BTD
        sums = dataclasses.replace(routing.sums, overflowed=home.overflowed.astype(jnp.float32))
        return y_BTD, dataclasses.replace(routing, sums=sums)

    def _cast(self, leaf: jax.Array) -> jax.Array:
        if leaf.dtype == self.dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Rounding first changes no bit. XLA:TPU moves a mere cast ahead of the loop over layers,
        # where it is of all of them at once: for 8x22B on 128 chips, 2 GiB of each.
        width = jnp.finfo(self.dtype)
        return jax.lax.reduce_precision(leaf, width.nexp, width.nmant).astype(self.dtype)
