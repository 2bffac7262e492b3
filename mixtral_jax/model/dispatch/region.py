"""The region in which each device works on its own rows: out to the experts, and home again."""

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

# The mesh axes over which devices do different work inside the region.
_REGION_AXES = ("data", "fsdp", "expert", "tensor")
# If a remat policy keeps arrays of this name, the backward pass does not repeat the move out.
ARRIVED = "rows arrived"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """The experts' output per token, and the number of overflowed routes over all devices."""

    y_BTD: jax.Array
    overflowed: jax.Array


@jax.named_scope("dispatch")
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
    """The sum of weight * expert(x) over each token's kept experts.

    Args:
        experts: a pytree that is called as experts(x_RD, weight_R1, groups) and weighs its rows.
            Its leaves have num_experts as leading dimension, are sharded over the `expert` axis,
            and are gathered here over `fsdp`.
        routes: experts, weights and is_kept of the routes, each [B, T, A].
        is_checked: whether jax checks over which mesh axes values vary. False for a kernel that
            does not tell jax over which mesh axes its results vary (`supports_vma_check`). The
            results are the same either way.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    spread = tuple(axis for axis in _REGION_AXES if sizes[axis] > 1)
    batch = tuple(axis for axis in rules.batch or () if axis in spread)
    # XLA does not see through collectives over one device, so the region gets the other axes only.
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
    """Gathers a weight over `fsdp`; the transpose is a reduce-scatter of the gradient."""
    for dimension, axes in enumerate(spec):
        if axes == "fsdp":
            # Shards get a dimension of their own, the outermost in memory. XLA:TPU turns the
            # transpose of any other gather into an all-reduce of the whole gradient, which takes
            # twice the bytes of a reduce-scatter.
            shards = jax.lax.all_gather(weight, "fsdp")
            shards = with_layout_constraint(shards, Layout(tuple(range(shards.ndim))))
            weight = jax.lax.collapse(jnp.moveaxis(shards, 0, dimension), dimension, dimension + 2)
    return weight


def _drop_axes(x: jax.Array, kept: tuple[str, ...]) -> jax.Array:
    """The same array, laid out over the axes in `kept` only.

    The other axes have one device, so nothing moves.
    """

    def drop(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(
            axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis in kept
        )

    return jax.reshard(x, P(*map(drop, jax.typeof(x).sharding.spec)))


def _vary(x: jax.Array, spread: tuple[str, ...]) -> jax.Array:
    """Marks `x` as varying over every axis of the region, so that its gradient is summed."""
    axes = tuple(axis for axis in spread if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
