"""Scores of continuations equal sums over the logits."""

from pathlib import Path

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from mixtral_jax.evaluate import scoring
from mixtral_jax.evaluate.scoring import Pair, score_pairs
from tests.cases import mesh_of

HF = Path(__file__).parents[1] / "golden" / "hf_tiny"


def score_by_logits(loaded, pair):
    ids = [*pair.context, *pair.continuation]
    logits = loaded.logits(np.pad([ids], ((0, 0), (0, 48 - len(ids)))))[0].astype(np.float64)
    rows = logits[len(pair.context) - 1 : len(ids) - 1]
    at = (np.arange(len(rows)), pair.continuation)
    nats = np.log(np.exp(rows).sum(-1)) - rows[at]
    return -nats.sum(), np.array_equal(rows.argmax(-1), pair.continuation)


def test_scores_are_sums_over_the_logits_of_continuations_of_any_length(monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_TOKENS_PER_DEVICE", 64)
    monkeypatch.setattr(scoring, "_MAX_LOGITS_PER_ROW", 8)
    loaded = mixtral_jax.load_pretrained(HF, dtype="float32", mesh=mesh_of(expert=2, tensor=2))
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (20, 20), (5, 3), (1, 30), (31, 2), (3, 0), (8, 1)]
    pairs = [
        Pair(rng.integers(3, 512, a).tolist(), rng.integers(3, 512, b).tolist()) for a, b in lengths
    ]
    greedy = loaded.generate(pairs[0].context, max_new_tokens=5)
    pairs += [
        Pair(pairs[0].context, greedy),
        Pair(pairs[0].context, [*greedy[:-1], greedy[-1] ^ 1]),
    ]
    scores = dict(score_pairs(loaded, pairs))
    assert sorted(scores) == list(range(len(pairs)))
    for number, pair in enumerate(pairs):
        nats, is_greedy = score_by_logits(loaded, pair)
        assert scores[number].loglikelihood == pytest.approx(nats, abs=2e-4)
        assert scores[number].is_greedy == is_greedy
    assert (scores[7].is_greedy, scores[8].is_greedy, scores[5].loglikelihood) == (True, False, 0)


def test_a_continuation_of_nothing_is_refused():
    loaded = mixtral_jax.load_pretrained(HF, mesh=mesh_of())
    with pytest.raises(ConfigError, match="at least one token"):
        next(score_pairs(loaded, [Pair([], [1])]))
