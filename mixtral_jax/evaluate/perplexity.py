"""The held-out loss, perplexity and bits per byte of a model."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.model.balance import RoutingSums, add_sums
from mixtral_jax.model.routing_metrics import name_metrics, router_metrics
from mixtral_jax.model.transformer import ModelOutput
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.loss import cross_entropy

Evaluator = Callable[[Any], dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _EvalSums:
    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    routing: RoutingSums

    def __add__(self, other: "_EvalSums") -> "_EvalSums":
        added = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(added, routing=add_sums(self.routing, other.routing))


@dataclasses.dataclass(frozen=True)
class TokenBytes:
    """The number of UTF-8 bytes of text behind each target, for batches without `text_bytes`.

    `per_token` [V] has the bytes of each piece. The first piece of a document (the one after
    `bos_id`) has `prefix` more bytes than its text, which the tokenizer adds.
    """

    per_token: np.ndarray
    bos_id: int
    prefix: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenBytes":
        """The counts for the pieces of a tokenizer."""
        return cls(tokenizer.bytes_per_token, tokenizer.bos_id, tokenizer.prefix_bytes)

    def in_text(self, piece_bytes: Any, previous: Any) -> Any:
        """Bytes of text, given the bytes of pieces and the token before each, in the same shape."""
        is_first = (previous == self.bos_id) & (piece_bytes > 0)  # A control token has no bytes.
        return piece_bytes - self.prefix * is_first


def make_evaluator(
    batches: Iterable[Batch], token_bytes: TokenBytes, baselines: Mapping[str, float] | None = None
) -> Evaluator:
    """Returns a function that computes the `eval/` metrics of a model over all of `batches`.

    Args:
        token_bytes: gives the bytes of text by which bits per byte divides.
        baselines: bits per byte of other models by name, on the same tokens. They are returned as
            `eval/bits_per_byte_NAME`.
    """
    per_token_V = token_bytes.per_token.astype(np.int32)
    add = jax.jit(operator.add)  # One execution for each batch, not one for each sum.

    @jax.jit
    def sum_batch(model: Callable[..., ModelOutput], batch: Batch) -> _EvalSums:
        micro = jax.tree.map(lambda rows: rows[0], batch)
        output = model(micro.tokens, micro.positions, micro.segment_ids)
        losses_BT = cross_entropy(output.logits_BTV, micro.targets) * micro.loss_mask.astype(
            jnp.float32
        )
        bytes_BT = micro.text_bytes
        if bytes_BT is None:
            sharding = jax.typeof(micro.targets).sharding
            piece_bytes_BT = jnp.asarray(per_token_V).at[micro.targets].get(out_sharding=sharding)
            bytes_BT = token_bytes.in_text(piece_bytes_BT, micro.tokens)
        return _EvalSums(
            jnp.sum(losses_BT),
            jnp.sum(micro.loss_mask),
            jnp.sum(bytes_BT * micro.loss_mask),
            output.routing.sums,
        )

    def evaluate(model: Any) -> dict[str, Any]:
        sums = functools.reduce(add, (sum_batch(model, b) for b in batches))
        nats, tokens, num_bytes = float(sums.nats), int(sums.tokens), int(sums.bytes)
        loss = nats / tokens
        routing = jax.device_get(name_metrics(router_metrics(sums.routing), "eval/"))
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
            "eval/tokens": tokens,
            **{f"eval/bits_per_byte_{name}": value for name, value in (baselines or {}).items()},
            **{name: value.tolist() for name, value in routing.items()},
        }

    return evaluate
