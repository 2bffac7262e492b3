"""Counts on the devices which experts the tokens of a text choose.

Only real tokens count, not padding. Each device counts its own rows in whole numbers, batch after
batch; the devices are added up once, at the end. So the counts are the same on every mesh.
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
    """Counts of real tokens, uint32.

    On the devices, every array has a leading dimension of the devices that hold rows. The first
    choice of a token is the expert that the router ranks first. A labelling of X - 1 labels has
    counts of length X, which begin with the tokens that have no label.
    """

    tokens: Any  # [], all tokens
    first_LE: Any  # tokens whose first choice is the expert
    together_LEE: Any  # tokens that chose both experts; on the diagonal, tokens that chose the one
    neighbours: Any  # [], pairs of consecutive tokens of the same document
    same_first_L: Any  # pairs of neighbours with the same first choice
    any_shared_L: Any  # pairs of neighbours with an expert in common
    tokens_V: Any  # tokens with the id
    first_LVE: Any  # tokens with the id whose first choice is the expert
    tokens_by_label: tuple[Any, ...]  # for each labelling, tokens with the label, [X]
    chosen_by_label: tuple[Any, ...]  # for each labelling, tokens that chose the expert, [L, X, E]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OverlapCounts:
    """How far two models agree on the experts of the same real tokens, uint32."""

    tokens: Any  # [], all tokens
    common_L: Any  # experts that both models chose, summed over tokens
    same_set_L: Any  # tokens with the same set of experts
    same_first_L: Any  # tokens with the same first choice


CountsT = TypeVar("CountsT", RouteCounts, OverlapCounts)


@jax.jit
def _route(model: Any, batch: Batch) -> jax.Array:
    rows = jax.tree.map(lambda rows: rows[0], batch)
    return model(rows.tokens, rows.positions, rows.segment_ids).routing.experts_BTA


def route(model: Any, batch: Batch, dtype: str) -> jax.Array:
    """Returns the experts of each token, best first, int32 [L, B, T, A].

    `model` is a `Transformer` that computes in `dtype`; `batch` has a leading dimension of 1.
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
    """Counts the routes of all batches over all devices; the result is on this host.

    `jax.set_mesh` must be in force.

    Args:
        routed: for each batch: the batch; its label numbers by each labelling, [len(num_labels), B,
            T]; and its experts from `route`.
        num_labels: for each labelling, the number of label numbers, including 0 for no label.
    """
    count_rows = functools.partial(_count_rows, sizes=(num_experts, vocab_size, *num_labels))

    @jax.jit
    def count(batch: Batch, labels_NBT: jax.Array, experts_LBTA: jax.Array) -> RouteCounts:
        on_devices = jax.shard_map(count_rows, out_specs=rules.spec("batch"))
        return on_devices(batch.tokens[0], batch.segment_ids[0], labels_NBT, experts_LBTA)

    total = _add_up(count(*each) for each in routed)
    return jax.tree.map(np.asarray, _add_devices(total))


def count_overlap(compared: Iterable[tuple[Batch, jax.Array, jax.Array]]) -> OverlapCounts:
    """Counts how far two models agree; the result is on this host.

    Each item is a batch with the experts of its tokens by one model and by the other, as `route`
    returns them.
    """
    counts = (_overlap(batch.segment_ids, *both) for batch, *both in compared)
    return jax.tree.map(np.asarray, _add_up(counts))


def _add_up(counts: Iterable[CountsT]) -> CountsT:
    """Adds counts up.

    The host waits for the sum before it makes the next batch, or batches would pile up in memory.
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
    """Counts the rows of one device; every count gets a leading dimension of 1."""
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
    # Layers are counted one after another, because [M, A, E] of all layers at once would be large.
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
    # float32 is exact for the counts of one batch on one device, and all back ends multiply it.
    chosen_ME = chosen_ME.astype(jnp.float32)
    return jnp.einsum("me,mf->ef", chosen_ME, chosen_ME, precision="highest").astype(jnp.uint32)


def _tabulate(ids_M: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Sums the values, [M, ...], of each id; returns [size, ...]."""
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[ids_M].add(values)
