"""Token stores: the split by document, the limit on bad rows, and the cache."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.text import prepare_text
from mixtral_jax.data.tokenizer import Tokenizer

NUM_DOCUMENTS = 60


def write_corpus(folder, numbers=range(NUM_DOCUMENTS)):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:03}.txt").write_text(
            f"Document {number} says: {'many words ' * (number % 7)}.\n"
        )
    return folder


def prepare(path, tmp_path, workdir="run", **settings):
    config = DataConfig(
        **{"path": str(path), "tokenizer": "train:290", "held_out_fraction": 0.2, **settings}
    )
    return prepare_text(config, 512, tmp_path / workdir / "tokenizer.model")


def read_texts(store, tokenizer):
    """The documents of a store as text; each lies between BOS and EOS."""
    documents = [store.tokens[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in documents)
    return [tokenizer.decode(ids[1:-1]) for ids in documents]


def test_every_document_is_on_one_side_and_comes_back(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    prepared = prepare(corpus, tmp_path)
    train = read_texts(prepared.train, prepared.tokenizer)
    held_out = read_texts(prepared.held_out, prepared.tokenizer)
    assert sorted(train + held_out) == sorted(file.read_text() for file in corpus.iterdir())
    assert 1 <= len(held_out) <= NUM_DOCUMENTS // 2
    assert prepared.train.tokens.dtype == np.uint16 and prepared.train.offsets.dtype == np.int64
    assert len(prepared.train.tokens) == prepared.train.offsets[-1]


def test_new_documents_move_no_old_one(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", range(0, NUM_DOCUMENTS, 2))
    before = prepare(corpus, tmp_path)
    write_corpus(corpus)
    after = prepare(corpus, tmp_path)
    for side in ("train", "held_out"):
        old = read_texts(getattr(before, side), before.tokenizer)
        assert set(old) < set(read_texts(getattr(after, side), after.tokenizer))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(tmp_path, fraction):
    prepared = prepare(write_corpus(tmp_path / "corpus"), tmp_path, held_out_fraction=fraction)
    sizes = sorted(len(store.offsets) - 1 for store in (prepared.train, prepared.held_out))
    assert sizes == [1, NUM_DOCUMENTS - 1]


def test_the_tail_of_a_single_document_is_held_out_from_a_line(tmp_path):
    text = "".join(f"line {number} of the play\n" for number in range(200))
    (tmp_path / "play.txt").write_text(text)
    prepared = prepare(tmp_path / "play.txt", tmp_path)
    (train,) = read_texts(prepared.train, prepared.tokenizer)
    (held_out,) = read_texts(prepared.held_out, prepared.tokenizer)
    assert train + held_out == text and train.endswith("\n")
    assert len(held_out) == pytest.approx(0.2 * len(text), abs=30)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_copies_of_a_document_are_on_one_side(tmp_path, fraction):
    rows = [f"Text number {number % 3} says some words." for number in range(60)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepared = prepare(
        tmp_path / "f.jsonl", tmp_path, tokenizer="train:280", held_out_fraction=fraction
    )
    train = read_texts(prepared.train, prepared.tokenizer)
    held_out = read_texts(prepared.held_out, prepared.tokenizer)
    assert sorted(train + held_out) == sorted(rows)
    assert train and held_out and not set(train) & set(held_out)


def test_documents_that_are_all_copies_are_a_single_one(tmp_path):
    text = "".join(f"line {number} of the play\n" for number in range(200))
    (tmp_path / "copies").mkdir()
    for number in range(20):
        (tmp_path / "copies" / f"{number}.txt").write_text(text)
    prepared = prepare(tmp_path / "copies", tmp_path)
    (train,) = read_texts(prepared.train, prepared.tokenizer)
    (held_out,) = read_texts(prepared.held_out, prepared.tokenizer)
    assert train + held_out == text


def test_fields_that_are_not_read_are_counted_and_kept_with_the_cache(tmp_path):
    rows = [{"text": f"row number {number}", "id": number} for number in range(NUM_DOCUMENTS)]
    rows[0]["source"] = "s"
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):
        prepared = prepare(tmp_path / "f.jsonl", tmp_path, tokenizer="train:280")
        assert prepared.unread == {"id": NUM_DOCUMENTS, "source": 1}


def write_rows(file, *, good, bad):
    lines = [json.dumps({"text": f"row number {number} is a good one"}) for number in range(good)]
    file.write_text("\n".join([*lines[:3], *["{broken"] * bad, *lines[3:]]))


def test_bad_rows_within_the_limit_are_left_out_and_counted(tmp_path, caplog):
    write_rows(tmp_path / "f.jsonl", good=75, bad=25)
    prepared = prepare(tmp_path / "f.jsonl", tmp_path, max_bad_fraction=0.25)
    assert len(prepared.train.offsets) + len(prepared.held_out.offsets) - 2 == 75
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("invalid JSON" in message for message in warnings) == 20
    assert "f.jsonl:4: invalid JSON" in warnings[0] and "5 more bad rows" in warnings[20]
    assert warnings[-1].endswith("25 bad rows are left out")
    caplog.clear()
    prepare(tmp_path / "f.jsonl", tmp_path, max_bad_fraction=0.25)
    assert "25 bad rows are left out" in caplog.text  # From the cache: no row is read again.


def test_bad_rows_over_the_limit_end_the_run(tmp_path):
    write_rows(tmp_path / "f.jsonl", good=33, bad=7)
    expected = (
        r"7 of 40 rows are bad \(17.5%\), over data.max_bad_fraction=0.01: mend .*; "
        r"first: .*f.jsonl:4: invalid JSON: "
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(tmp_path / "f.jsonl", tmp_path)


def test_a_cached_text_is_held_to_the_limit_of_each_run(tmp_path, monkeypatch):
    write_rows(tmp_path / "f.jsonl", good=75, bad=25)
    prepare(tmp_path / "f.jsonl", tmp_path, max_bad_fraction=0.3)
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts: pytest.fail("tokenized again"))
    prepare(tmp_path / "f.jsonl", tmp_path, workdir="other", max_bad_fraction=0.5)
    (tmp_path / "moved").mkdir()
    (tmp_path / "f.jsonl").rename(tmp_path / "moved" / "f.jsonl")
    with pytest.raises(
        ConfigError, match=r"25 of 100 rows are bad .*first: .*/moved/f.jsonl:4: invalid JSON"
    ):
        prepare(tmp_path / "moved", tmp_path, workdir="strict", max_bad_fraction=0.1)
    assert not (tmp_path / "strict").exists()


def test_no_document_at_all_is_a_config_error(tmp_path):
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no row"):
        prepare(tmp_path / "f.jsonl", tmp_path)


def test_a_tokenizer_too_large_for_the_model_is_a_config_error(tmp_path):
    config = DataConfig(path=str(write_corpus(tmp_path / "corpus")), tokenizer="train:290")
    with pytest.raises(ConfigError, match=r"--config.model.vocab_size=290"):
        prepare_text(config, 200, tmp_path / "run" / "tokenizer.model")
    assert not (tmp_path / "run").exists()


def test_text_is_tokenized_once_over_all_runs(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    first = prepare(corpus, tmp_path)
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts: pytest.fail("tokenized again"))
    second = prepare(corpus, tmp_path, workdir="other")
    assert second.train.fingerprint == first.train.fingerprint
    assert (tmp_path / "run/tokenizer.model").read_bytes() == (
        tmp_path / "other/tokenizer.model"
    ).read_bytes()


def test_changed_files_are_read_again(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    before = prepare(corpus, tmp_path)
    (corpus / "000.txt").write_text("Something else altogether.\n")
    after = prepare(corpus, tmp_path)
    assert (
        before.tokenizer.fingerprint == after.tokenizer.fingerprint
    )  # The run keeps the one it has.
    assert before.train.fingerprint != after.train.fingerprint


def test_the_cache_is_found_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    config = DataConfig(path=str(write_corpus(tmp_path / "corpus")), tokenizer="train:290")
    prepare_text(config, 512, tmp_path / "tokenizer.model")
    assert any((tmp_path / "caches" / "mixtral_jax").iterdir())


def test_a_process_killed_while_writing_leaves_no_half_cache(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    killed = f"""
import os
from pathlib import Path
from mixtral_jax.config import DataConfig
from mixtral_jax.data import cache, text
cache.StoreWriter.__exit__ = lambda *error: os._exit(9)
config = DataConfig(path={str(corpus)!r}, tokenizer="train:290", held_out_fraction=0.2)
text.prepare_text(config, 512, Path({str(tmp_path / "run" / "tokenizer.model")!r}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", killed], env=environment, check=False).returncode == 9
    )
    prepared = prepare(corpus, tmp_path)
    assert len(prepared.train.offsets) + len(prepared.held_out.offsets) - 2 == NUM_DOCUMENTS


@pytest.mark.parametrize(
    "name", ["summary.json", "train/tokens", "held_out/offsets.npy", "train/summary.json"]
)
def test_a_damaged_cache_is_written_again_with_a_warning(tmp_path, cache_dir, caplog, name):
    corpus = write_corpus(tmp_path / "corpus")
    before = np.array(prepare(corpus, tmp_path).train.tokens)  # A copy: the file it maps is cut.
    (file,) = cache_dir.glob(f"*/{name}")
    whole = file.read_bytes()
    for kept in (0, 1, 20):
        caplog.clear()
        file.write_bytes(whole[: min(kept, len(whole) - 1)])
        after = prepare(corpus, tmp_path)
        np.testing.assert_array_equal(after.train.tokens, before)
        assert file.read_bytes() == whole
        assert "is damaged" in caplog.text and "tokenized again" in caplog.text


def test_the_cache_is_on_the_disk_before_it_has_its_name(tmp_path, cache_dir, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, target: synced.append(target) or replace(path, target)
    )
    prepare(write_corpus(tmp_path / "corpus"), tmp_path)
    (folder,) = (entry for entry in cache_dir.iterdir() if entry.is_dir())
    before = synced[: synced.index(folder)]
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} <= set(before)


def test_an_interrupted_write_cleans_up(tmp_path, cache_dir, monkeypatch):
    def interrupt(self, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tokenizer, "encode_all", interrupt)
        prepare(write_corpus(tmp_path / "corpus"), tmp_path)
    assert not [entry for entry in cache_dir.iterdir() if entry.is_dir()]


def test_a_process_that_comes_second_uses_what_the_first_wrote(tmp_path, cache_dir, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    prepare(corpus, tmp_path)
    (folder,) = (entry for entry in cache_dir.iterdir() if entry.is_dir())
    encode_all = Tokenizer.encode_all

    def encode_while_another_finishes(self, texts):
        folder.with_name("elsewhere").rename(folder)
        return encode_all(self, texts)

    folder.rename(folder.with_name("elsewhere"))
    monkeypatch.setattr(Tokenizer, "encode_all", encode_while_another_finishes)
    assert len(prepare(corpus, tmp_path).train.tokens)
    assert [entry for entry in cache_dir.iterdir() if entry.is_dir()] == [folder]
