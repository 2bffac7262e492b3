"""Moving rows between devices: from tokens to the experts they chose, and home again.

The only file with collectives of its own. Everything here runs per device, inside the one
`jax.shard_map` of `dispatch`: M counts this device's tokens (or, gathered, those of its expert
group), E its experts, and R has room for the most rows it can get.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P

from mixtral_jax.parallel.rules import AxisRules

# Mesh axes over which the work inside the region differs.
_REGION_AXES = ("data", "fsdp", "expert", "tensor")


def dispatch(
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    num_experts: int,
    x_BTD: jax.Array,
    experts_BTA: jax.Array,
    weights_BTA: jax.Array,
    is_kept_BTA: jax.Array,
    rules: AxisRules,
) -> jax.Array:
    """Sum over a token's kept experts of weight * expert(x), [B, T, D]; nothing is dropped here.

    `experts` is a pytree called as experts(x_RD, rows_per_expert_E): its leaves, of leading dimension
    num_experts, are sharded over the `expert` axis, and gathered here over `fsdp`.
    """
    specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, experts)

    def per_device(experts, x_BTD, experts_BTA, weights_BTA, is_kept_BTA):
        experts = jax.tree.map(_gather_fsdp, experts, specs)
        D, A = x_BTD.shape[-1], experts_BTA.shape[-1]
        chosen_MA = jnp.where(is_kept_BTA, experts_BTA, num_experts).reshape(-1, A)
        x_MD = _vary(x_BTD.reshape(-1, D))
        plan, x_RD = all_gather_out(x_MD, chosen_MA, num_experts)
        y_RD = experts(x_RD, plan.rows_per_expert_E)
        y_MD = all_gather_back(y_RD, _vary(weights_BTA.reshape(-1, A)), plan)
        return jax.lax.psum(y_MD, "tensor").reshape(x_BTD.shape)

    out_specs = rules.spec("batch", None, None)
    return jax.shard_map(per_device, out_specs=out_specs)(experts, x_BTD, experts_BTA, weights_BTA, is_kept_BTA)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Which route each row serves, and back. Rows are sorted by expert, then by token."""

    route_R: jax.Array  # index into the M * A routes
    row_MA: jax.Array  # row of each route; R where the route is not for this device
    rows_per_expert_E: jax.Array

    @property
    def token_R(self) -> jax.Array:
        """The token that each row is a copy of."""
        return self.route_R // self.row_MA.shape[1]

    def per_route(self) -> "RowPlan":
        """The same rows, seen as copies of routes instead of tokens."""
        return RowPlan(self.route_R, self.row_MA.reshape(-1, 1), self.rows_per_expert_E)


def all_gather_out(x_MD: jax.Array, chosen_MA: jax.Array, num_experts: int) -> tuple[RowPlan, jax.Array]:
    """Transport by all-gather, on the way out: every token of the expert group, then this device's rows.

    `chosen_MA` is num_experts for a route that goes nowhere. Moves E/k times what is needed, but
    works on every back end, and cannot overflow: at most min(A, E) routes of a token are for here.
    """
    num_local = num_experts // jax.lax.axis_size("expert")
    x_MD, chosen_MA = _gather_group(x_MD), _gather_group(chosen_MA)
    local_MA = chosen_MA - num_local * jax.lax.axis_index("expert")
    local_MA = jnp.where((local_MA >= 0) & (local_MA < num_local), local_MA, num_local)
    plan = plan_rows(local_MA, num_local)
    return plan, copy_tokens(x_MD, plan)


def all_gather_back(y_RD: jax.Array, weights_MA: jax.Array, plan: RowPlan) -> jax.Array:
    """Transport by all-gather, on the way home: weighted sums of the rows here, summed over the group."""
    y_MD = sum_rows(_weigh(y_RD, _gather_group(weights_MA), plan), plan)
    return jax.lax.psum_scatter(y_MD, "expert", scatter_dimension=0, tiled=True)


def plan_rows(local_MA: jax.Array, num_local: int) -> RowPlan:
    """Sorts routes by local expert (num_local: not for here) into the fewest rows that always suffice."""
    M, A = local_MA.shape
    R = M * min(A, num_local)
    expert_of_route = local_MA.reshape(-1)
    route_of_row = jnp.argsort(expert_of_route, stable=True)
    row_of_route = jnp.where(expert_of_route < num_local, jnp.argsort(route_of_row), R)
    rows_per_expert_E = jnp.sum(expert_of_route[:, None] == jnp.arange(num_local)[None], axis=0, dtype=jnp.int32)
    return RowPlan(route_of_row[:R], row_of_route.reshape(M, A), rows_per_expert_E)


@jax.custom_vjp
def copy_tokens(x_MD: jax.Array, plan: RowPlan) -> jax.Array:
    """The token of each row, [R, D]; rows past the last expert's hold some token. Transpose: `sum_rows`."""
    return x_MD[plan.token_R]


@jax.custom_vjp
def sum_rows(y_RD: jax.Array, plan: RowPlan) -> jax.Array:
    """The sum of each token's rows, [M, D], in float32. The transpose of `copy_tokens`, and a gather too."""
    y_MAD = y_RD.at[plan.row_MA].get(mode="fill", fill_value=0)
    return jnp.sum(y_MAD, axis=1, dtype=jnp.float32).astype(y_RD.dtype)


# Autodiff would make a scatter-add of each gather; that each is the other's transpose is known only here.
copy_tokens.defvjp(
    lambda x_MD, plan: (copy_tokens(x_MD, plan), plan), lambda plan, dx_RD: (sum_rows(dx_RD, plan), None)
)
sum_rows.defvjp(lambda y_RD, plan: (sum_rows(y_RD, plan), plan), lambda plan, dy_MD: (copy_tokens(dy_MD, plan), None))


def _weigh(y_RD: jax.Array, weights_MA: jax.Array, plan: RowPlan) -> jax.Array:
    """Rows times the weight of their route; rows past the last expert's become zero, whatever they held."""
    weight_R1 = copy_tokens(weights_MA.reshape(-1, 1), plan.per_route())
    is_used_R1 = (jnp.arange(y_RD.shape[0]) < jnp.sum(plan.rows_per_expert_E))[:, None]
    return jnp.where(is_used_R1, y_RD * weight_R1, 0).astype(y_RD.dtype)


def _gather_group(x_MX: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x_MX, "expert", tiled=True)


def _gather_fsdp(weight: jax.Array, spec: P) -> jax.Array:
    """Whole along the dimension that `fsdp` cuts; the transpose is a reduce-scatter of the gradient."""
    for dimension, axes in enumerate(spec):
        if axes == "fsdp":
            weight = jax.lax.all_gather(weight, "fsdp", axis=dimension, tiled=True)
    return _vary(weight)


def _vary(x: jax.Array) -> jax.Array:
    """Marks `x` as differing over every axis of the region, so that its gradient is summed over them."""
    axes = tuple(axis for axis in _REGION_AXES if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
