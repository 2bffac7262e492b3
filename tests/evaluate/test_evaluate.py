"""Held-out metrics equal a direct computation."""

import math

import jax
import numpy as np
import optax
import pytest

from mixtral_jax.evaluate.ngram import measure_ngrams
from mixtral_jax.evaluate.perplexity import TokenBytes, make_evaluator
from mixtral_jax.training.state import init_state
from tests.cases import cpu_model_maker, mesh_of, on_mesh, packed_batch, small_config

BOS = 1


def batches_of(config):
    return [packed_batch(config, seed) for seed in (1, 2)]


def test_held_out_loss_and_bits_are_sums_over_all_batches_divided_once():
    config, mesh = small_config(), mesh_of(expert=4)
    bytes_per_token = np.arange(96) % 5
    batches = batches_of(config)
    with jax.set_mesh(mesh):
        state = init_state(cpu_model_maker(config), optax.sgd(0.0))
        figures = make_evaluator(
            [on_mesh(b, mesh) for b in batches], TokenBytes(bytes_per_token, BOS, 1), {"coin": 8.0}
        )(state.model())
        nats = num_bytes = tokens = 0.0
        for batch in batches:
            rows = (batch.tokens[0], batch.positions[0], batch.segment_ids[0])
            micro = (
                x[0]
                for x in map(
                    lambda x: on_mesh(x, mesh), (batch.tokens, batch.positions, batch.segment_ids)
                )
            )
            logits = np.asarray(
                jax.jit(lambda model, *rows: model(*rows).logits_BTV)(state.model(), *micro),
                np.float64,
            )
            log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            mask, targets = batch.loss_mask[0] > 0, batch.targets[0]
            nats -= np.take_along_axis(log_probability, targets[..., None], -1)[..., 0][mask].sum()
            tokens += mask.sum()
            num_bytes += bytes_per_token[targets[mask]].sum() - (rows[0][mask] == BOS).sum()
    assert figures["eval/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["eval/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert figures["eval/tokens"] == tokens
    assert figures["eval/bits_per_byte_coin"] == 8.0


def test_a_bigram_model_of_a_deterministic_sequence_is_nearly_certain_and_a_unigram_is_not():
    config = small_config()
    batch = packed_batch(config)
    cycle = np.arange(10_000) % 90 + 3
    batch = type(batch)(
        *(cycle[np.arange(8 * 24).reshape(1, 8, 24) + shift] for shift in (0, 1)),
        batch.loss_mask,
        batch.segment_ids,
        batch.positions,
    )
    bits = measure_ngrams(cycle, [batch], TokenBytes(np.ones(96, np.int64), BOS, 1))
    assert bits["unigram"] == pytest.approx(math.log2(90), rel=0.01)
    assert bits["bigram"] < 0.15


def test_ngrams_of_unseen_tokens_are_finite():
    config = small_config()
    bits = measure_ngrams(
        np.full(50, 7), batches_of(config), TokenBytes(np.ones(96, np.int64), BOS, 1)
    )
    assert math.isfinite(bits["unigram"]) and math.isfinite(bits["bigram"])


def test_a_control_token_after_the_start_of_a_document_has_no_bytes():
    token_bytes = TokenBytes(np.array([0, 0, 4]), BOS, prefix=1)
    assert token_bytes.in_text(np.array([0, 4, 4]), np.array([BOS, BOS, 2])).tolist() == [0, 3, 4]
