"""The region where devices work by themselves: out to the experts, through them, and home."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from mixtral_jax.kernels.groups import RowGroups
from mixtral_jax.model.dispatch.transport import Transport
from mixtral_jax.parallel.rules import AxisRules

# Mesh axes over which the work inside the region differs.
_REGION_AXES = ("data", "fsdp", "expert", "tensor")
# Remat policies that keep this name do not repeat the move out in the backward pass.
ARRIVED = "rows arrived"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What comes home, [B, T, D], and how many routes found no room on the way, over all devices."""

    y_BTD: jax.Array
    overflowed: jax.Array


def dispatch(
    experts: Callable[[jax.Array, jax.Array, RowGroups], jax.Array],
    transport: Transport,
    num_experts: int,
    x_BTD: jax.Array,
    routes: tuple[jax.Array, jax.Array, jax.Array],
    rules: AxisRules,
    *,
    is_checked: bool = True,
) -> Dispatched:
    """Sum over a token's kept experts of weight * expert(x).

    `experts` is a pytree called as experts(x_RD, weight_R1, groups), which weighs too: its leaves,
    of leading dimension num_experts, are sharded over the `expert` axis, and gathered here over
    `fsdp`. `routes` are the experts, weights and keeping of a `Routing`, each [B, T, A]. jax checks
    which values differ between devices, unless kernels of others take part that do not say it
    (`is_checked=False`): same numbers.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    spread = tuple(axis for axis in _REGION_AXES if sizes[axis] > 1)
    batch = tuple(axis for axis in rules.batch or () if axis in spread)
    # XLA does not see through collectives over one device, so the region is told of the other axes
    # alone.
    experts, x_BTD, routes = jax.tree.map(lambda x: _drop_axes(x, spread), (experts, x_BTD, routes))
    specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, experts)

    def per_device(experts, x_BTD, experts_BTA, weights_BTA, is_kept_BTA):
        D, A = x_BTD.shape[-1], experts_BTA.shape[-1]
        chosen_MA = jnp.where(is_kept_BTA, experts_BTA, num_experts).reshape(-1, A)
        x_MD, weights_MA = (
            _vary(x, spread) for x in (x_BTD.reshape(-1, D), weights_BTA.reshape(-1, A))
        )
        arrival, journey = transport.out(x_MD, weights_MA, chosen_MA)
        arrival = jax.tree.map(lambda x: checkpoint_name(x, ARRIVED), arrival)
        whole = jax.tree.map(
            lambda weight, spec: _vary(_gather_fsdp(weight, spec), spread), experts, specs
        )
        groups = RowGroups(arrival.rows_per_expert_E, balanced_rows=chosen_MA.size)
        y_RD = whole(arrival.x_RD, arrival.weight_R1, groups)
        y_MD = transport.home(y_RD, journey)
        y_MD = jax.lax.psum(y_MD, "tensor") if "tensor" in spread else y_MD
        return y_MD.reshape(x_BTD.shape), jax.lax.psum(arrival.overflowed, batch)

    region = jax.shard_map(per_device, out_specs=(P(batch), P()), check_vma=is_checked)
    y_BTD, overflowed = region(experts, x_BTD, *routes)
    return Dispatched(jax.reshard(y_BTD, rules.spec("batch", None, None)), overflowed)


def _gather_fsdp(weight: jax.Array, spec: P) -> jax.Array:
    """Whole along the dimension that `fsdp` cuts; the transpose is a reduce-scatter of the
    gradient.
    """
    for dimension, axes in enumerate(spec):
        if axes == "fsdp":
            # Shards get a dimension of their own, the outermost in memory. Of the transpose of any
            # other gather XLA:TPU makes an all-reduce of the whole gradient, twice the bytes of a
            # reduce-scatter.
            shards = jax.lax.all_gather(weight, "fsdp")
            shards = with_layout_constraint(shards, Layout(tuple(range(shards.ndim))))
            weight = jax.lax.collapse(jnp.moveaxis(shards, 0, dimension), dimension, dimension + 2)
    return weight


def _drop_axes(x: jax.Array, kept: tuple[str, ...]) -> jax.Array:
    """The same array, whose layout does not name the other axes: they have one device, so nothing
    moves.
    """

    def drop(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(
            axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis in kept
        )

    return jax.reshard(x, P(*map(drop, jax.typeof(x).sharding.spec)))


def _vary(x: jax.Array, spread: tuple[str, ...]) -> jax.Array:
    """Marks `x` as differing over every axis of the region, so that its gradient is summed over
    them.
    """
    axes = tuple(axis for axis in spread if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
