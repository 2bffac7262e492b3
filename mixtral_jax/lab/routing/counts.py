"""Which experts tokens visit, counted on the devices: sums over real tokens, the same on every
mesh.

Each device counts its own rows in whole numbers, batch after batch; they are added up over devices
once, at the end. What the counts mean is for `routing_analysis`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.parallel.batch import Batch
from mixtral_jax.parallel.mesh import matmul_precision
from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouteCounts:
    """Counts of real tokens, uint32. On devices, with a leading dimension of the devices that hold
    rows.

    A token's first choice is the expert that its router puts first. `tokens_by_label` and
    `chosen_by_label`: one of each for every labelling, of X labels and first of tokens without one.
    """

    tokens: Any  # []
    first_LE: Any  # tokens whose first choice it is
    together_LEE: Any  # tokens that chose both; of one expert with itself, all that chose it
    neighbours: Any  # [], pairs of a token and the next of its document
    same_first_L: Any  # such pairs with the same first choice
    any_shared_L: Any  # such pairs with an expert in common
    tokens_V: Any
    first_LVE: Any  # tokens of an id whose first choice it is
    tokens_by_label: tuple[Any, ...]  # [X] each
    chosen_by_label: tuple[Any, ...]  # [L, X, E] each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OverlapCounts:
    """How far two models agree about the same real tokens, uint32."""

    tokens: Any  # []
    common_L: Any  # experts that both chose, summed over tokens
    same_set_L: Any  # tokens of which all experts are the same
    same_first_L: Any


CountsT = TypeVar("CountsT", RouteCounts, OverlapCounts)


@jax.jit
def _route(model: Any, batch: Batch) -> jax.Array:
    rows = jax.tree.map(lambda rows: rows[0], batch)
    return model(rows.tokens, rows.positions, rows.segment_ids).routing.experts_BTA


def route(model: Any, batch: Batch, dtype: str) -> jax.Array:
    """The experts of each token, best first, int32 [L, B, T, A], by a `Transformer` that computes
    in `dtype`.
    """
    with jax.default_matmul_precision(matmul_precision(dtype)):
        return _route(model, batch)


def count_routes(
    routed: Iterable[tuple[Batch, jax.Array, jax.Array]],
    *,
    num_experts: int,
    vocab_size: int,
    num_labels: Sequence[int],
    rules: AxisRules,
) -> RouteCounts:
    """Counts of all batches, over all devices, on this host; under `jax.set_mesh`.

    Args:
        routed: of each batch, itself; a number from 0 for each token by each labelling,
            [len(num_labels), B, T]; and what `route` gives for it.
        num_labels: how many numbers each labelling has, 0 for none among them.
    """
    count_rows = functools.partial(_count_rows, sizes=(num_experts, vocab_size, *num_labels))

    @jax.jit
    def count(batch: Batch, labels_NBT: jax.Array, experts_LBTA: jax.Array) -> RouteCounts:
        on_devices = jax.shard_map(count_rows, out_specs=rules.spec("batch"))
        return on_devices(batch.tokens[0], batch.segment_ids[0], labels_NBT, experts_LBTA)

    total = _add_up(count(*each) for each in routed)
    return jax.tree.map(np.asarray, _add_devices(total))


def count_overlap(compared: Iterable[tuple[Batch, jax.Array, jax.Array]]) -> OverlapCounts:
    """Over batches, each with the experts of its tokens by one model and by another; on this host."""
    counts = (_overlap(batch.segment_ids, *both) for batch, *both in compared)
    return jax.tree.map(np.asarray, _add_up(counts))


def _add_up(counts: Iterable[CountsT]) -> CountsT:
    """The sum, of which the host is never more than a batch ahead: else batches would pile up
    before the devices.
    """

    def add(total: CountsT, each: CountsT) -> CountsT:
        return _add(jax.block_until_ready(total), each)

    return functools.reduce(add, counts)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: CountsT, counts: CountsT) -> CountsT:
    return jax.tree.map(jnp.add, total, counts)


@jax.jit
def _add_devices(counts: CountsT) -> CountsT:
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), counts)


@jax.jit
def _overlap(
    segment_ids_1BT: jax.Array, one_LBTA: jax.Array, other_LBTA: jax.Array
) -> OverlapCounts:
    is_real_BT = segment_ids_1BT[0] > 0
    is_common_LBTA = jnp.any(one_LBTA[..., None] == other_LBTA[..., None, :], axis=-1)
    common_LBT = jnp.sum(is_common_LBTA, axis=-1, dtype=jnp.uint32) * is_real_BT[None]

    def count(is_so_LBT: jax.Array) -> jax.Array:
        return jnp.sum(is_so_LBT & is_real_BT[None], axis=(1, 2), dtype=jnp.uint32)

    return OverlapCounts(
        tokens=jnp.sum(is_real_BT, dtype=jnp.uint32),
        common_L=jnp.sum(common_LBT, axis=(1, 2), dtype=jnp.uint32),
        same_set_L=count(jnp.all(is_common_LBTA, axis=-1)),
        same_first_L=count(one_LBTA[..., 0] == other_LBTA[..., 0]),
    )


def _count_rows(
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    labels_NBT: jax.Array,
    experts_LBTA: jax.Array,
    *,
    sizes: tuple[int, ...],
) -> RouteCounts:
    """The counts of one device's rows, with the leading dimension of one."""
    E, V, *num_labels = sizes
    is_real_BT = segment_ids_BT > 0
    is_pair_BT = is_real_BT[:, 1:] & (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1])
    labels_NM = labels_NBT.reshape(len(num_labels), tokens_BT.size)

    def count_layer(experts_BTA: jax.Array) -> dict[str, Any]:
        is_chosen_BTAE = experts_BTA[..., None] == jnp.arange(E)[None, None, None]
        is_chosen_BTAE &= is_real_BT[..., None, None]
        is_first_BTE, is_chosen_BTE = is_chosen_BTAE[:, :, 0], jnp.any(is_chosen_BTAE, axis=2)
        first_ME, chosen_ME = (
            is_so.reshape(-1, E).astype(jnp.uint32) for is_so in (is_first_BTE, is_chosen_BTE)
        )
        is_shared_BT = jnp.any(is_chosen_BTE[:, 1:] & is_chosen_BTE[:, :-1], axis=-1)
        is_same_BT = experts_BTA[:, 1:, 0] == experts_BTA[:, :-1, 0]
        return {
            "first_LE": jnp.sum(first_ME, axis=0, dtype=jnp.uint32),
            "together_LEE": _count_together(chosen_ME),
            "same_first_L": _count(is_same_BT & is_pair_BT),
            "any_shared_L": _count(is_shared_BT & is_pair_BT),
            "first_LVE": _tabulate(tokens_BT.reshape(-1), first_ME, V),
            "chosen_by_label": tuple(
                _tabulate(labels_M, chosen_ME, X)
                for labels_M, X in zip(labels_NM, num_labels, strict=True)
            ),
        }

    real_M = is_real_BT.reshape(-1).astype(jnp.uint32)
    # One layer after another: [M, A, E] of all of them at once would be large.
    counts = RouteCounts(
        tokens=_count(is_real_BT),
        neighbours=_count(is_pair_BT),
        tokens_V=_tabulate(tokens_BT.reshape(-1), real_M, V),
        tokens_by_label=tuple(
            _tabulate(labels_M, real_M, X)
            for labels_M, X in zip(labels_NM, num_labels, strict=True)
        ),
        **jax.lax.map(count_layer, experts_LBTA),
    )
    return jax.tree.map(lambda x: x[None], counts)


def _count(is_so: jax.Array) -> jax.Array:
    return jnp.sum(is_so, dtype=jnp.uint32)


def _count_together(chosen_ME: jax.Array) -> jax.Array:
    # float32 holds every count of a device's batch, and every back end multiplies it.
    chosen_ME = chosen_ME.astype(jnp.float32)
    return jnp.einsum("me,mf->ef", chosen_ME, chosen_ME, precision="highest").astype(jnp.uint32)


def _tabulate(ids_M: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """The sum of the values, [M, ...], of each id below `size`."""
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[ids_M].add(values)
