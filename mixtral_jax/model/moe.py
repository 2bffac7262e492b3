"""The mixture of experts: route, dispatch, compute, combine; and the experts that need no route."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.config import DispatchConfig, GroupedMatmulName, ModelConfig, RouterConfig
from mixtral_jax.kernels.choose import Kernels
from mixtral_jax.kernels.chunks import apply_in_chunks
from mixtral_jax.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_swiglu,
    has_dense_gradient,
    skips_missing_rows,
    supports_vma_check,
    swiglu_of_layer,
)
from mixtral_jax.kernels.groups import RowGroups, weigh
from mixtral_jax.model.balance import RoutingSums, sum_routing
from mixtral_jax.model.dispatch.region import dispatch
from mixtral_jax.model.dispatch.transports import TRANSPORTS
from mixtral_jax.model.router import Router
from mixtral_jax.model.shared_experts import SharedExperts
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """One layer's decision, and the sums that losses and metrics are computed from.

    A route is kept unless its token is padding, nobody chose it, or its expert is over capacity.
    """

    logits_BTE: jax.Array  # float32, before noise
    experts_BTA: jax.Array  # int32, best first where tokens choose
    weights_BTA: jax.Array  # float32
    is_kept_BTA: jax.Array  # bool
    sums: RoutingSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEOutput:
    """What the mixture adds to each token, and how the tokens were routed."""

    y_BTD: jax.Array
    routing: Routing


class MoE(nnx.Module):
    """Sparse mixture of experts (Mixtral, arXiv 2401.04088, section 2.1)."""

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        kernels: Kernels,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.num_experts = config.num_experts
        self.dtype = config.dtype
        self.rules = rules
        self.router = Router(config, router, dispatch, rules, rngs)
        self.experts = Experts(config, kernels.grouped_matmul.name, rules, rngs)
        make_transport = TRANSPORTS[kernels.transport.name]
        self.transport = make_transport(config.num_experts, dispatch.buffer_factor)
        # Last, because random numbers are drawn in order: all other parameters start as they would
        # without shared experts.
        self.shared_experts = (
            SharedExperts(config, rules, rngs) if config.num_shared_experts else None
        )

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> MoEOutput:
        routes = self.router(x_BTD, tokens)
        home = dispatch(
            jax.tree.map(self._cast, self.experts),
            self.transport,
            self.num_experts,
            x_BTD,
            (routes.experts_BTA, routes.weights_BTA, routes.is_kept_BTA),
            self.rules,
            is_checked=supports_vma_check(self.experts.kernel),
        )
        y_BTD = home.y_BTD + self.shared_experts(x_BTD) if self.shared_experts else home.y_BTD
        routing = Routing(
            logits_BTE=routes.logits_BTE,
            experts_BTA=routes.experts_BTA,
            weights_BTA=routes.weights_BTA,
            is_kept_BTA=routes.is_kept_BTA,
            sums=sum_routing(routes, tokens.is_real_BT, home.overflowed),
        )
        return MoEOutput(y_BTD, routing)

    def _cast(self, leaf: jax.Array) -> jax.Array:
        """A weight in the compute dtype, in which it is then gathered."""
        if leaf.dtype == self.dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Rounding first changes no bit. XLA:TPU moves a plain cast ahead of the loop over layers,
        # where it casts all layers at once: for 8x22B on 128 chips, 2 GiB of each chip.
        width = jnp.finfo(self.dtype)
        return jax.lax.reduce_precision(leaf, width.nexp, width.nmant).astype(self.dtype)


class Experts(nnx.Module):
    """SwiGLU experts (arXiv 2002.05202) on contiguous rows, times the weights of their routes.

    Each projection may be replaced by another callable on (x_RD, groups). While all three are
    plain, a kernel that has a fused SwiGLU runs it.
    """

    def __init__(
        self, config: ModelConfig, kernel: GroupedMatmulName, rules: AxisRules, rngs: nnx.Rngs
    ):
        D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
        shared = {"config": config, "rules": rules, "rngs": rngs}
        self.kernel: GroupedMatmulName = kernel
        self.gate = ExpertProjection((E, D, F), ("expert", "embed", "mlp"), kernel, **shared)
        self.up = ExpertProjection((E, D, F), ("expert", "embed", "mlp"), kernel, **shared)
        self.down = ExpertProjection((E, F, D), ("expert", "mlp", "embed"), kernel, **shared)

    @jax.named_scope("experts")
    def __call__(self, x_RD: jax.Array, weight_R1: jax.Array, groups: RowGroups) -> jax.Array:
        if skips_missing_rows(self.kernel):
            return weigh(self._swiglu(x_RD, groups), weight_R1, groups)
        rows, is_by_expert = (x_RD, weight_R1), has_dense_gradient(self.kernel)
        is_one_expert = len(groups.rows_per_expert_E) == 1
        if len(x_RD) <= groups.balanced_rows and (is_one_expert or not is_by_expert):
            return self._weighted_swiglu(rows, groups)
        return apply_in_chunks(Experts._weighted_swiglu, is_by_expert, self, rows, groups)

    def plain_weights(self) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """The weights of gate, up and down; None if any projection has been replaced."""
        projections = (self.gate, self.up, self.down)
        if any(type(projection) is not ExpertProjection for projection in projections):
            return None
        gate_EDF, up_EDF, down_EFD = (projection.weight[...] for projection in projections)
        return gate_EDF, up_EDF, down_EFD

    def _swiglu(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        if weights := self.plain_weights():
            return grouped_swiglu(x_RD, *weights, groups, self.kernel)
        return self.down(self._hidden(x_RD, groups), groups)

    def _weighted_swiglu(self, rows: tuple[jax.Array, jax.Array], groups: RowGroups) -> jax.Array:
        """Weighs the input of `down`, so that the gradient of a route's weight needs no output."""
        x_RD, weight_R1 = rows
        return self.down(weigh(self._hidden(x_RD, groups), weight_R1, groups), groups)

    def _hidden(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        return jax.nn.silu(self.gate(x_RD, groups)) * self.up(x_RD, groups)


class ExpertsOfLayer(nnx.Module):
    """The experts of one layer of a stack, for a few rows without gradient.

    Their weights are read from the stack, where slicing the layer out would copy them all.
    """

    def __init__(self, stack: Experts, layer: jax.Array):
        self.stack = stack
        self.layer = nnx.data(layer)
        self.kernel: GroupedMatmulName = stack.kernel

    def __call__(self, x_RD: jax.Array, weight_R1: jax.Array, groups: RowGroups) -> jax.Array:
        if weights := self.stack.plain_weights():
            y_RD = swiglu_of_layer(x_RD, *weights, groups, self.kernel, self.layer)
            return weigh(y_RD, weight_R1, groups)
        return jax.tree.map(lambda weight: weight[self.layer], self.stack)(x_RD, weight_R1, groups)


class ExpertProjection(nnx.Module):
    """One matrix per expert, which multiplies rows that are sorted by expert.

    `init` and `variable` are as in `Projection`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str | None, str | None, str | None],
        kernel: GroupedMatmulName,
        *,
        config: ModelConfig,
        rules: AxisRules,
        rngs: nnx.Rngs,
        init: nnx.Initializer | None = None,
        variable: type[nnx.Param] = nnx.Param,
    ):
        self.axes = axes
        self.rules = rules
        self.kernel: GroupedMatmulName = kernel
        init = init or nnx.initializers.normal(config.initializer_range)
        weight = init(rngs.params(), shape, config.param_dtype, out_sharding=rules.spec(*axes))
        self.weight = variable(weight)

    def __call__(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        return grouped_matmul(x_RD, self.weight[...], groups, self.kernel)

    def input_weights(self) -> tuple[nnx.Variable, ...]:
        """The variables that multiply this projection's input, as [..., inputs, outputs]."""
        return (self.weight,)
