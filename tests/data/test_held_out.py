"""Held-out data of one's own: all of `data.held_out`, and nothing of `data.path`."""

import json
import logging

import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.chat.prepare import prepare_chats
from mixtral_jax.data.labels import find_labellings
from mixtral_jax.data.sources import all_sources, find_held_out
from mixtral_jax.data.text import prepare_text, tokenize_text
from mixtral_jax.data.tokenizer import Tokenizer
from tests.data.chat_cases import train_tokenizer

READERS = {"text": tokenize_text, "chat": prepare_chats}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def as_row(text):
    # The same row is a document and a conversation.
    return {
        "text": text,
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}],
    }


def write(file, texts):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(as_row(text)) + "\n" for text in texts))
    return file


def read(store, tokenizer):
    ids = (store.read(number).tokens.tolist() for number in range(store.num_documents))
    return [
        tokenizer.decode(document).removesuffix("[/INST] Yes.").strip("[INST] ") for document in ids
    ]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "d" / "train.jsonl", [f"taught {number}" for number in range(30)])
    write(tmp_path / "d" / "dev.jsonl", [f"asked {number}" for number in range(4)])
    return tmp_path / "d"


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("held_out", ["validation", "{}/dev.jsonl", "{}/d*v.jsonl"])
def test_all_of_one_is_trained_on_and_all_of_the_other_held_out(tokenizer, folder, kind, held_out):
    config = DataConfig(path=str(folder), held_out=held_out.format(folder))
    prepared = READERS[kind](config, tokenizer)
    assert read(prepared.train, tokenizer) == [f"taught {number}" for number in range(30)]
    assert read(prepared.held_out, tokenizer) == [f"asked {number}" for number in range(4)]
    assert prepared.num_shared == 0


@pytest.mark.parametrize("kind", READERS)
def test_a_single_row_may_be_trained_on_and_another_held_out(tokenizer, tmp_path, kind):
    one, other = write(tmp_path / "a.jsonl", ["one"] * 3), write(tmp_path / "b.jsonl", ["other"])
    prepared = READERS[kind](DataConfig(path=str(one), held_out=str(other)), tokenizer)
    assert (prepared.train.num_documents, prepared.held_out.num_documents) == (3, 1)


@pytest.mark.parametrize("kind", READERS)
def test_rows_of_both_are_counted_also_from_the_cache(monkeypatch, tokenizer, folder, kind):
    write(folder / "test.jsonl", ["taught 3", "asked 0", "taught 5", "taught 3"])
    config = DataConfig(path=str(folder), held_out="test")
    assert READERS[kind](config, tokenizer).num_shared == 3
    monkeypatch.setattr(Tokenizer, "encode_all", lambda *_: pytest.fail("tokenized again"))
    assert READERS[kind](config, tokenizer).num_shared == 3


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        ("test", "has no split test, only train, validation"),
        ("nothing.jsonl", "data.held_out=nothing.jsonl does not exist"),
        ("{}", "holds the splits train, validation: name the files or the folder of one"),
        ("{}/dev.jsonl:2", "has a weight, but all of it is held out: leave the weight out"),
        ("{}/dev.jsonl,{}/dev.jsonl", "names {}/dev.jsonl twice"),
        ("train", "data.held_out=train is what is trained on: name another split"),
        ("", "data.held_out is empty"),
    ],
)
def test_held_out_data_that_cannot_be_had_are_refused_by_name(tokenizer, folder, held_out, words):
    with pytest.raises(ConfigError) as error:
        config = DataConfig(path=str(folder), held_out=held_out.replace("{}", str(folder)))
        tokenize_text(config, tokenizer)
    assert words.replace("{}", str(folder)) in str(error.value)


@pytest.mark.parametrize("path", ["python-stdlib", "{}/train.jsonl", "{}/*.jsonl"])
def test_a_split_of_what_has_none_is_refused(tokenizer, folder, path):
    config = DataConfig(path=path.format(folder), held_out="validation")
    with pytest.raises(ConfigError, match=r"split.* name a path"):
        tokenize_text(config, tokenizer)


def test_a_word_that_is_a_split_and_a_folder_is_refused(monkeypatch, folder):
    (folder / "validation").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"is called so too: for that, write \./validation"):
        find_held_out(DataConfig(path="train.jsonl", held_out="validation"))


def test_the_split_is_that_of_every_source(folder, tmp_path):
    write(tmp_path / "e" / "train.jsonl", ["a"])
    write(tmp_path / "e" / "valid.jsonl", ["b"])
    config = DataConfig(path=f"{folder}:2,{tmp_path / 'e'}", held_out="validation")
    assert [(source.split, source.weight) for source in all_sources(config)] == [
        ("train", 2.0),
        ("train", 1.0),
        ("validation", None),
        ("validation", None),
    ]


def test_bad_rows_of_each_are_held_to_the_limit(tokenizer, folder, caplog):
    (folder / "dev.jsonl").write_text("{broken\n" + json.dumps(as_row("good")))
    config = DataConfig(path=str(folder), held_out="validation", max_bad_fraction=0.1)
    with pytest.raises(ConfigError, match=r"data.held_out=validation: 1 of 2 rows are bad"):
        tokenize_text(config, tokenizer)
    (folder / "dev.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"data.path=.*d, split validation, holds no row"):
        tokenize_text(config, tokenizer)
    assert caplog.records[0].levelno == logging.WARNING


def test_one_of_several_sources_without_a_row_is_refused(tokenizer, folder, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    config = DataConfig(path=f"{folder},{tmp_path / 'empty.jsonl'}")
    with pytest.raises(ConfigError, match=r"data.path=.*empty.jsonl holds no row"):
        tokenize_text(config, tokenizer)


def test_the_tokenizer_is_trained_on_the_text_to_train_on_alone(folder, tmp_path):
    write(folder / "train.jsonl", ["abc abd " * 40 + str(number) for number in range(40)])
    write(folder / "dev.jsonl", ["\u03a9mega"])
    config = DataConfig(path=str(folder), held_out="validation", tokenizer="train:280")
    trained = prepare_text(config, 512, tmp_path / "tokenizer.model").tokenizer
    pieces = trained.pieces(range(trained.vocab_size))
    assert "\u03a9" not in pieces and any("ab" in piece for piece in pieces)


def test_tokens_are_labelled_by_the_source_that_they_come_from(tokenizer, folder):
    config = DataConfig(path=str(folder), held_out="validation")
    prepared = tokenize_text(config, tokenizer)
    (source, *_) = find_labellings([prepared.train, prepared.held_out], config, tokenizer)
    assert source.names == (str(folder), f"{folder} validation")
    assert set(source.label(prepared.train, 0)) == {1}
    assert set(source.label(prepared.held_out, 0)) == {2}
    alone = find_labellings([prepared.held_out], config, tokenizer)
    assert "source" not in [labelling.title for labelling in alone]
