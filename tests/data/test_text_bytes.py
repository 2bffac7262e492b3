"""Bits per byte are of the text itself, whatever a tokenizer makes of it."""

import io

import numpy as np
import pytest
import sentencepiece

from mixtral_jax.config import DataConfig
from mixtral_jax.data.batches import held_out_batches
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.packing import plan_rows
from mixtral_jax.data.text import tokenize_text
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluate.ngram import measure_ngrams
from mixtral_jax.evaluate.perplexity import TokenBytes
from mixtral_jax.parallel.rules import AxisRules
from tests.cases import mesh_of

TEXTS = [
    "plain words",
    "  two  spaces   and more   at the end   ",
    "ligature \ufb01x, full width \uff37ide, \u00e9 and e\u0301",
    "unknown \u2603 and emoji \U0001f600",
    "lines\r\n\n\tand\ttabs\n",
    "",
    "   ",
]
KEEPS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "like Mixtral's": {**KEEPS, "byte_fallback": True},
    "without a prefix": {**KEEPS, "byte_fallback": True, "add_dummy_prefix": False},
    "without bytes": KEEPS,
    "strips spaces": {**KEEPS, "byte_fallback": True, "remove_extra_whitespaces": True},
    "rewrites": {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn pieces of, and more of them"] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **KINDS[request.param],
    )
    return Tokenizer(model.getvalue())


def test_the_bytes_behind_the_ids_of_a_text_are_those_of_the_text(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_all(TEXTS), strict=True):
        counts = tokenizer.count_text_bytes(text, ids)
        assert len(counts) == len(ids) and (counts >= 0).all()
        assert counts.sum() == (len(text.encode()) if len(ids) else 0)


def test_held_out_batches_and_baselines_count_the_bytes_of_the_text(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("something else, to train on")
    held_out = "  A  ligature \ufb01x,  in full width: \uff37ide.  "
    (tmp_path / "held_out.txt").write_text(held_out)
    store = tokenize_text(
        DataConfig(path=str(tmp_path / "*.txt"), held_out_fraction=0.5), tokenizer
    )
    stores = [store.train, store.held_out]
    mesh = mesh_of(expert=8)
    bits = {}
    for part in stores:
        batches = held_out_batches(
            part, plan_rows(part, 16), num_sequences=99, batch_size=8, mesh=mesh, rules=AxisRules()
        )
        token_bytes = TokenBytes.of(tokenizer)
        mask = np.concatenate([np.asarray(batch.loss_mask) for batch in batches]) > 0
        figures = measure_ngrams(np.arange(tokenizer.vocab_size), batches, token_bytes)
        num_bits = mask.sum() * np.log2(tokenizer.vocab_size)
        bits[round(num_bits / figures["unigram"])] = part
    texts = ("something else, to train on", held_out)
    assert sorted(bits) == sorted(len(text.encode()) for text in texts)


def test_answers_have_the_bytes_of_their_texts(tokenizer):
    messages = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": "the  \ufb01rst"},
        {"role": "user", "content": "another"},
        {"role": "assistant", "content": "\u2603 second"},
    ]
    encoded = ChatTemplate(tokenizer).encode(messages)
    assert encoded.text_bytes is not None
    learned = int((encoded.text_bytes * encoded.loss_mask).sum())
    assert learned == sum(len(each["content"].encode()) for each in messages[1::2])
