"""Tokenizers: trained, reloaded, given; and what their ids stand for."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mixtral_jax.config import ConfigError
from mixtral_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

TEXTS = [Path(argparse.__file__).read_text()]
STRANGE = [
    "plain words",
    "  two  spaces   three ",
    "\ttabs\t\tand\r\n\n\n  lines\n",
    "emoji 😀👩‍👩‍👧 and 漢字",
    "</s> <s> <unk> <0x41>",
    "zero\0byte",
    "12345",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(
        "train:400", lambda: TEXTS, tmp_path_factory.mktemp("trained") / "tokenizer.model"
    )


def test_special_ids_are_those_of_mixtral(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 400)


@pytest.mark.parametrize("text", STRANGE)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_words_in_text_stay_text(tokenizer):
    ids = tokenizer.encode("</s> <s> <unk>")
    assert not {0, 1, 2} & set(ids)


def test_control_ids_stand_for_no_text(tokenizer):
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2]) == "text"


def test_digits_stay_apart(tokenizer):
    assert len(tokenizer.encode("199")) >= 3


@pytest.mark.parametrize("text", STRANGE)
def test_bytes_per_token_adds_up_to_the_text(tokenizer, text):
    assert tokenizer.prefix_bytes == 1
    assert (
        tokenizer.bytes_per_token[tokenizer.encode(text)].sum()
        == len(text.encode()) + tokenizer.prefix_bytes
    )
    assert not tokenizer.bytes_per_token[:3].any()


def test_encode_all_is_encode_of_each(tokenizer):
    assert [ids.tolist() for ids in tokenizer.encode_all(STRANGE)] == [
        tokenizer.encode(text) for text in STRANGE
    ]
    assert tokenizer.encode_all([]) == [] and tokenizer.encode("") == []


LONG = (
    TEXTS[0][:10_000]
    + "".join(STRANGE) * 50
    + " " * 500
    + "\u2581 x\u2581y" * 50
    + "\n" * 500
    + "é😀" * 300
)


@pytest.mark.parametrize(
    ("characters", "chunks"), [(1, 64), (2, 64), (7, 64), (1000, 64), (1000, 1)]
)
def test_a_long_text_is_encoded_in_chunks_to_the_ids_of_one_call(
    tokenizer, monkeypatch, characters, chunks
):
    expected = tokenizer.encode_all([LONG, *STRANGE])
    sizes = []
    encode = Tokenizer._encode
    monkeypatch.setattr(
        Tokenizer,
        "_encode",
        lambda self, texts: sizes.extend(map(len, texts)) or encode(self, texts),
    )
    monkeypatch.setattr("mixtral_jax.data.tokenizer._ENCODING_CHUNK_CHARACTERS", characters)
    monkeypatch.setattr("mixtral_jax.data.tokenizer._MAX_CHUNKS_PER_CALL", chunks)
    for ids, others in zip(tokenizer.encode_all([LONG, *STRANGE]), expected, strict=True):
        np.testing.assert_array_equal(ids, others)
    assert max(sizes) < 1000 + characters


@pytest.mark.parametrize(
    "rule", [{"normalization_rule_name": "nmt_nfkc", "byte_fallback": True}, {}]
)
def test_models_that_rewrite_text_or_know_not_all_of_it_give_the_same_ids(
    tmp_path, monkeypatch, rule
):
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **rule}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=600,
        **settings,
    )
    given = Tokenizer((tmp_path / "m.model").read_bytes())
    expected = given.encode(LONG)
    monkeypatch.setattr("mixtral_jax.data.tokenizer._ENCODING_CHUNK_CHARACTERS", 7)
    assert given.encode(LONG) == expected


def test_a_model_without_a_dummy_prefix_adds_no_bytes(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
    )
    given = Tokenizer((tmp_path / "m.model").read_bytes())
    assert given.prefix_bytes == 0
    assert given.bytes_per_token[given.encode("def f")].sum() == 5


def test_training_is_deterministic(tokenizer, tmp_path):
    again = load_tokenizer("train:400", lambda: TEXTS, tmp_path / "tokenizer.model")
    assert again.fingerprint == tokenizer.fingerprint


def test_long_texts_are_sampled_over_their_whole_length(tmp_path, monkeypatch):
    monkeypatch.setattr("mixtral_jax.data.tokenizer_training._MAX_TRAINING_CHARACTERS", 20_000)
    texts = ["a" * 50_000, "b" * 50_000 + "é" * 50_000]
    sampled = load_tokenizer("train:280", lambda: texts, tmp_path / "tokenizer.model")
    assert all(len(sampled.encode(letter * 64)) <= 32 for letter in "abé")


def test_a_saved_tokenizer_is_used_again_without_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer.model")
    again = load_tokenizer(
        "train:400", lambda: pytest.fail("trained again"), tmp_path / "run" / "tokenizer.model"
    )
    assert again.fingerprint == tokenizer.fingerprint
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["tokenizer.model"]


def test_a_model_file_is_loaded_and_copied(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "given.model")
    loaded = load_tokenizer(
        str(tmp_path / "given.model"), list, tmp_path / "run" / "tokenizer.model"
    )
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (
        tmp_path / "given.model"
    ).read_bytes()


def test_a_run_never_changes_its_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    with pytest.raises(
        ConfigError, match=r"is another tokenizer than data.tokenizer=train:500: use a new workdir"
    ):
        load_tokenizer("train:500", lambda: TEXTS, tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("mixtral", "tokenizer.model.v1"),
        ("mixtral-v3", "mistral_instruct_tokenizer_240323.model.v3"),
    ],
)
def test_mixtrals_own_comes_from_the_installed_package(
    tokenizer, tmp_path, monkeypatch, spec, file
):
    tokenizer.save(tmp_path / "mistral_common" / "data" / file)
    (tmp_path / "mistral_common" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        load_tokenizer(spec, list, tmp_path / "tokenizer.model").fingerprint
        == tokenizer.fingerprint
    )


def test_mixtrals_own_without_the_package_names_the_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[mistral\]'"):
        load_tokenizer("mixtral", list, tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train:10", "10 pieces are too few or too many for this text .*choose another N"),
        ("train:100000", "100000 pieces are too few or too many .*<= "),
        ("train:99999999999999999999", "at most 9 digits"),
        ("train:many", "train:N needs a whole number of at most 9 digits, such as train:4096"),
        ("train:", "train:N needs a whole number"),
        (
            "absent.model",
            "data.tokenizer=absent.model: no such file; give a SentencePiece .model file",
        ),
        (__file__, "not a SentencePiece model"),
    ],
)
def test_a_wrong_spec_is_a_config_error(tmp_path, capfd, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(spec, lambda: TEXTS, tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()
    assert capfd.readouterr() == ("", "")


def test_no_bytes_are_no_tokenizer():
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(b"")


def test_the_model_must_have_a_row_for_every_piece(tokenizer):
    check_vocabulary(tokenizer, 400)
    check_vocabulary(tokenizer, 512)
    with pytest.raises(
        ConfigError, match=r"has 400 pieces .*=399: use the tokenizer that the model"
    ):
        check_vocabulary(tokenizer, 399)
    with pytest.raises(ConfigError, match=r"=399: set --config.model.vocab_size=400"):
        check_vocabulary(tokenizer, 399, is_planned=True)
