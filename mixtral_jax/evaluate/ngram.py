"""Baselines that a neural model has to beat: unigram and bigram models of the training tokens."""

import math
from collections.abc import Sequence

import numpy as np

from mixtral_jax.evaluate.perplexity import TokenBytes
from mixtral_jax.parallel.batch import Batch


def measure_ngrams(
    train_tokens: np.ndarray, batches: Sequence[Batch], token_bytes: TokenBytes
) -> dict[str, float]:
    """Bits per byte of a `unigram` and a `bigram` model, fitted on `train_tokens`.

    They are scored on the same tokens as `make_evaluator` scores. The unigram model has one added
    count per token. The bigram model backs off to it with Witten-Bell weights: a token that had
    many different successors trusts its counts less. Every row must be on this host.
    """
    V = len(token_bytes.per_token)
    history, target = (_supervised(batches, field) for field in ("tokens", "targets"))
    if batches[0].text_bytes is None:
        num_bytes = int(token_bytes.in_text(token_bytes.per_token[target], history).sum())
    else:
        num_bytes = int(_supervised(batches, "text_bytes").sum())
    counts = np.bincount(train_tokens, minlength=V) + 1.0
    unigram = counts / counts.sum()

    pairs, pair_counts = np.unique(
        train_tokens[:-1].astype(np.int64) * V + train_tokens[1:], return_counts=True
    )
    history_counts = np.bincount(pairs // V, weights=pair_counts, minlength=V)
    successors = np.bincount(pairs // V, minlength=V)
    wanted = history.astype(np.int64) * V + target
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    pair_count = np.where(pairs[at] == wanted, pair_counts[at], 0)
    backoff = successors[history] * unigram[target]
    total = history_counts[history] + successors[history]
    bigram = np.where(total > 0, (pair_count + backoff) / np.maximum(total, 1), unigram[target])

    def bits_per_byte(probability: np.ndarray) -> float:
        return float(-np.log(probability).sum() / math.log(2) / max(num_bytes, 1))

    return {"unigram": bits_per_byte(unigram[target]), "bigram": bits_per_byte(bigram)}


def _supervised(batches: Sequence[Batch], field: str) -> np.ndarray:
    """A field of all batches, where the target counts in the loss."""
    return np.concatenate(
        [np.asarray(getattr(batch, field))[np.asarray(batch.loss_mask) > 0] for batch in batches]
    )
