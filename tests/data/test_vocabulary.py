"""The vocabulary of a SentencePiece model, and whether another program can find its pieces as it
does.
"""

import io

import pytest
import sentencepiece

from mixtral_jax.checkpoint.formats.tokenizer_json import make_tokenizer_json
from mixtral_jax.config import ConfigError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.vocabulary import add_control_pieces, read_vocabulary

MIXTRAL = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
}


def train(**changes: object) -> Tokenizer:
    model, texts = io.BytesIO(), (f"the {n}th of some lines of text" for n in range(300))
    settings = {
        **MIXTRAL,
        "vocab_size": 290,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **changes,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, **settings
    )
    return Tokenizer(model.getvalue())


def test_pieces_are_those_of_sentencepiece():
    tokenizer = train()
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer.model)
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.is_like_mixtral
    assert [(piece.text, piece.score) for piece in vocabulary.pieces] == [
        (processor.id_to_piece(token), processor.get_score(token))
        for token in range(processor.vocab_size())
    ]
    assert vocabulary.find("control") == ["<s>", "</s>"]
    assert len(vocabulary.find("byte")) == 256


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False, "vocab_size": 60},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["\u2581\u2581"]},
    ],
    ids=str,
)
def test_a_model_that_tokenizers_would_follow_otherwise_is_not_written_for_it(changes):
    tokenizer = train(**changes)
    assert not read_vocabulary(tokenizer).is_like_mixtral
    with pytest.raises(ConfigError, match="cannot be written for Hugging Face"):
        make_tokenizer_json(tokenizer)


def test_names_in_brackets_are_pieces_of_text():
    vocabulary = read_vocabulary(train(user_defined_symbols=["[REFERENCE_DOC_0]"]))
    assert vocabulary.is_like_mixtral
    assert "[REFERENCE_DOC_0]" in vocabulary.find("text")


def test_added_pieces_and_the_free_ids_between_them_have_no_bytes_of_text():
    tokenizer = train()
    size = tokenizer.vocab_size
    more = add_control_pieces(tokenizer, {size + 2: "<end of turn>"})
    assert more.vocab_size == size + 3 and more.unused_ids == (size, size + 1)
    assert not more.bytes_per_token[size:].any()
