"""Random routes of packed and padded rows, and their counts."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from mixtral_jax.lab.routing.counts import RouteCounts, count_routes
from mixtral_jax.parallel.batch import Batch
from tests.cases import RULES, on_mesh, packed_batch, small_config

L, B, T, E, V = 3, 8, 24, 8, 12
# The title of each labelling, and its labels.
NAMES = {"kind": ("a", "b", "never"), "half": ("first", "second")}
PIECES = [f"piece {token}" for token in range(V)]


@dataclasses.dataclass
class Routed:
    """A batch with the labels and the experts of its tokens, on the host."""

    batch: Batch
    labels: np.ndarray
    experts: np.ndarray


def random_routes(seed: int, k: int) -> Routed:
    """Rows of one to three documents, some padded; each token id prefers experts of its own."""
    rng = np.random.default_rng(seed)
    batch = packed_batch(small_config(model__vocab_size=V), seed)
    scores = rng.random((L, B, T, E)) + 0.5 * rng.random((L, V, E))[:, batch.tokens[0]]
    halves = np.broadcast_to(1 + (np.arange(T) >= T // 2), (B, T))
    labels = np.stack([rng.integers(0, 3, (B, T)), halves]).astype(np.int32)
    experts = np.argsort(-scores, axis=-1)[..., :k].astype(np.int32)
    return Routed(batch, labels, experts)


def count(routed: list[Routed], mesh: jax.sharding.Mesh) -> RouteCounts:
    """Counts the routes of batches on a mesh."""

    def put(array, *axes):
        return jax.device_put(array, jax.NamedSharding(mesh, RULES.spec(*axes)))

    with jax.set_mesh(mesh):
        placed = [
            (
                on_mesh(r.batch, mesh),
                put(r.labels, None, "batch", None),
                put(r.experts, None, "batch", None, None),
            )
            for r in routed
        ]
        return count_routes(placed, num_experts=E, vocab_size=V, num_labels=[4, 3], rules=RULES)


def real_tokens(routed: list[Routed]) -> Iterator[tuple[Routed, int, int, int]]:
    """Yields the batch, the row, the position and the id of each token that is not padding."""
    for r in routed:
        for b, t in np.argwhere(r.batch.segment_ids[0] > 0):
            yield r, b, t, int(r.batch.tokens[0, b, t])
