"""Which files of a folder are read, and that all others are named."""

import gzip
import os

import datasets
import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.sources import Source, describe_files, list_source
from tests.data.text_files import texts, write_file


def write(folder, *names):
    """Writes files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, [name])


def read(folder, split="train", suffixes=None):
    files = list_source(Source(str(folder), split=split), suffixes).files
    return [file.relative_to(folder).as_posix() for file in files]


def said(path, **settings):
    return "\n".join(describe_files(DataConfig(path=str(path), **settings)))


LAYOUTS = [
    ("train.jsonl", "test.jsonl"),
    ("train.jsonl", "validation.jsonl"),
    ("train.csv", "dev.csv"),
    ("training.json", "val.json"),
    ("Train.parquet", "EVAL.parquet"),
    ("train_1.jsonl", "valid_1.jsonl"),
    ("chats-train.jsonl", "chats-test.jsonl"),
    ("data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("data/train-00001-of-00002-9f38.parquet", "data/validation-00000-of-00001-0a1b.parquet"),
    ("en/c4-train.00000-of-01024.json", "en/c4-validation.00000-of-00008.json"),
    ("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"),
    ("train/a.jsonl", "test/a.jsonl"),
    ("en/train/b.csv", "en/dev/b.csv"),
    ("train/shards/1.jsonl", "test/train.jsonl"),
    ("train.txt", "valid.txt"),
    ("wiki.train.txt", "wiki.test.txt"),
    ("train/pos/1.txt", "test/pos/1.txt"),
    ("data_train/a.jsonl", "data_test/a.jsonl"),
    ("train-en/a.txt", "val-en/b.txt"),
    ("sets/my.training/a.csv", "sets/my.dev/a.csv"),
]


@pytest.mark.parametrize(("train", "other"), LAYOUTS)
def test_of_a_folder_with_splits_the_training_split_is_read_and_the_others_named(
    tmp_path, train, other
):
    write(tmp_path, train, other)
    assert read(tmp_path) == [train]
    assert f"{other})" in said(tmp_path) and "not read: split " in said(tmp_path)
    assert texts(tmp_path / other) == [other]  # A file that is named is read, whatever its name.


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl"),
        ("latest.jsonl", "contest.jsonl", "training-day.txt"),
        ("test.txt", "tests/a.txt", "unit/test/b.txt"),  # Names of texts say what they are about.
        ("a-test-of-time.jsonl", "b.jsonl"),
        ("en/train.jsonl", "fr/train.jsonl"),
        ("train.jsonl", "testimony.jsonl", "developer.jsonl", "train_dev_set/a.jsonl"),
        ("held_out.txt", "tests/testset.txt"),
    ],
)
def test_a_folder_without_other_splits_is_read_whole_and_nothing_is_said(tmp_path, names):
    write(tmp_path, *names)
    assert read(tmp_path) == sorted(names)
    assert said(tmp_path) == ""


@pytest.mark.parametrize(
    "name",
    [
        *("testset.jsonl", "chats_heldout.jsonl", "chats_holdout.csv", "held_out.jsonl"),
        *("devel.jsonl", "tst.jsonl", "DevSet.parquet", "hold-out/a.jsonl", "tests/1.jsonl"),
        *("my_test/a.jsonl", "val-fr/a.json.gz", "testset/a.txt", "heldout.txt"),
    ],
)
def test_a_file_that_may_be_of_another_split_is_named_where_it_is_trained_on(tmp_path, name):
    write(tmp_path, "chats_train.jsonl", name)
    assert name in read(tmp_path)
    doubt = "read as training data, although the name looks like another split"
    assert said(tmp_path) == f"data.path={tmp_path}: {doubt}: 1 ({name})"
    assert doubt not in said(tmp_path / "*")  # A glob is what the user has chosen.
    assert doubt not in said(tmp_path / "chats_train.jsonl", held_out=str(tmp_path / name))


def test_source_files_that_are_called_test_are_texts_like_others(tmp_path):
    names = ["model.py", "test/test_model.py", "test_data.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    assert read(tmp_path, suffixes=".py") == sorted(names)


def test_rows_of_no_split_are_trained_on_and_a_test_split_beside_them_is_not(tmp_path):
    write(tmp_path, "alpaca.jsonl", "alpaca_test.jsonl")
    assert read(tmp_path) == ["alpaca.jsonl"]
    assert "split test: 1 (alpaca_test.jsonl)" in said(tmp_path)


def test_a_folder_with_only_a_test_split_is_refused_by_name(tmp_path):
    write(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(ConfigError, match="holds no training split, only test, validation: to"):
        read(tmp_path)


def test_several_training_splits_of_shards_are_not_mixed(tmp_path):
    shards = [f"train_{name}-00000-of-00001.parquet" for name in ("gen", "sft")]
    write(tmp_path, *shards)
    with pytest.raises(ConfigError, match=r"several splits .*: train_gen, train_sft: name the"):
        read(tmp_path)
    assert texts(tmp_path / "train_sft-*") == [shards[1]]
    assert read(tmp_path, "train_sft") == [shards[1]]


@pytest.mark.parametrize("split", ["validation", "dev", "val", "valid"])
def test_a_split_has_every_name_of_its_kind(tmp_path, split):
    write(tmp_path, "train.jsonl", "dev.jsonl", "test.jsonl")
    assert read(tmp_path, split) == ["dev.jsonl"]


def test_a_split_that_is_missing_is_refused_with_those_that_are_there(tmp_path):
    write(tmp_path, "train.jsonl", "dev.jsonl")
    with pytest.raises(ConfigError, match="has no split test, only train, validation: name one"):
        read(tmp_path, "test")


def test_of_a_saved_data_set_only_the_training_split_is_read(tmp_path):
    parts = {
        name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test", "extra")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["train"]
    assert "split extra: 1 (saved/extra/data" in said(tmp_path)
    assert "split test: 1 (saved/test/data" in said(tmp_path)
    assert read(tmp_path / "saved", "extra") == ["extra/data-00000-of-00001.arrow"]
    assert texts(tmp_path / "saved" / "test") == ["test"]


def test_a_folder_that_holds_only_caches_of_map_holds_no_data(tmp_path):
    for name in ("cache-1.arrow", "cache-2.arrow"):
        (tmp_path / name).write_text("content")
    with pytest.raises(ConfigError, match=r"\(not read: caches of datasets' map: 2 \(cache-1"):
        read(tmp_path)


def test_a_folder_that_holds_nothing_is_refused_without_saying_what_is_not_read(tmp_path):
    with pytest.raises(ConfigError, match=r"data.suffixes can name others$"):
        read(tmp_path)


def test_caches_and_files_of_an_earlier_save_are_not_read_twice(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path)
    datasets.load_from_disk(str(tmp_path)).map(lambda row: {"text": row["text"] + "!"})
    write(tmp_path, "data-00000-of-00007.arrow")
    assert len(list(tmp_path.glob("cache-*.arrow"))) == 1
    assert texts(tmp_path) == ["a", "b"]
    assert "caches of datasets' map: 1 (cache-" in said(tmp_path)
    assert "not in state.json: 1 (data-00000-of-00007.arrow)" in said(tmp_path)
    assert "caches of datasets' map: 1 (cache-" in said(tmp_path / "*.arrow")


def test_a_saved_data_set_with_a_missing_file_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"lists data-00001-of-00002\.arrow, which is not there"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003.parquet"], "2 (train-00001-of-00003, train-00002-of-00003)"),
        (["c4-train.00000-of-01024.json"], "1,023 (c4-train.00001-of-01024, "),
        (["a-00001-of-00002-9f38.csv", "b-00002-of-00002.csv"], "2 (a-00000-of-00002, b-00001-of-"),
        (["train/x-1-of-3.jsonl", "train/x-3-of-3.jsonl"], "1 (train/x-2-of-3)"),
        (["a-00000-of-00002.csv", "a-00001-of-00002-7d.csv", "b-1-of-20240131.csv"], None),
    ],
)
def test_shards_that_are_missing_in_a_folder_are_named(tmp_path, names, missing):
    write(tmp_path, *names)
    assert read(tmp_path) == sorted(names)
    assert f"missing shards: {missing}" in said(tmp_path) if missing else not said(tmp_path)
    assert said(tmp_path / names[0]) == ""  # One that is named alone is meant alone.


def test_empty_files_of_rows_are_named(tmp_path):
    write(tmp_path, "a.jsonl")
    for name in ("b.jsonl", "c.csv", "d.NDJSON"):
        (tmp_path / name).touch()
    assert read(tmp_path) == ["a.jsonl"]
    assert said(tmp_path).endswith("not read: empty: 3 (b.jsonl, c.csv, d.NDJSON)")


@pytest.mark.parametrize("suffixes", [".jsonl", ".JSONL", ".gz", ".md,.gz"])
def test_the_suffixes_that_are_asked_for_name_formats_or_compressions(tmp_path, suffixes):
    write(tmp_path, "b.csv")
    (tmp_path / "a.JSONL.gz").write_bytes(gzip.compress(b'{"text": "a"}'))
    assert read(tmp_path, suffixes=suffixes) == ["a.JSONL.gz"]


def test_whatever_is_not_read_is_counted_by_kind_with_some_names(tmp_path):
    write(tmp_path, "a.jsonl", "deep/b.jsonl", "elsewhere/c.jsonl")
    for name in ("README.md", "LICENSE", "x.bin", "deep/y.bin", ".gitattributes", "state.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert read(tmp_path) == ["a.jsonl", "deep/b.jsonl", "elsewhere/c.jsonl"]
    assert said(tmp_path) == (
        f"data.path={tmp_path}: not read: hidden: 2 (.git, .gitattributes); linked folders: 1 "
        "(linked); links to nothing: 1 (gone.jsonl); metadata: 1 (state.json); no plain files: 1 "
        "(pipe.jsonl); other suffixes: 4 (LICENSE, README.md, deep/y.bin, ...)"
    )


def test_of_files_that_are_not_read_one_of_each_suffix_is_named(tmp_path):
    write(tmp_path, "a.jsonl")
    for name in ("1.md", "2.md", "3.md", "4.md", "b.jl", "c.jsonlines", "d.jsonl.bak", "e.zip"):
        (tmp_path / name).touch()
    expected = "other suffixes: 8 (1.md, b.jl, c.jsonlines, d.jsonl.bak, e.zip, ...)"
    assert said(tmp_path).endswith(expected)
    for i in range(30):
        (tmp_path / f"f.{i:02}").touch()
    assert said(tmp_path).endswith("f.06, ...)")


def test_what_a_glob_matches_and_is_not_read_is_named_too(tmp_path):
    write(tmp_path, "a.jsonl", "inner/b.jsonl")
    (tmp_path / "notes.md").touch()
    assert said(tmp_path / "*").endswith("folders: 1 (inner); other suffixes: 1 (notes.md)")
    assert said(tmp_path / "**").endswith("not read: other suffixes: 1 (notes.md)")
    assert said(tmp_path / "*.jsonl") == ""


def test_a_name_that_is_not_utf8_can_be_said(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / os.fsdecode(b"caf\xe9.md")).touch()
    assert said(tmp_path).encode() and "caf\\udce9.md" in said(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "closed/b.jsonl")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied: .*closed"):
        read(tmp_path)


@pytest.mark.parametrize("inside", [".", ".."])
def test_a_cache_of_the_hub_is_refused_with_what_to_name(tmp_path, inside):
    root = tmp_path / "hub" / "datasets--org--name"
    write(root / "snapshots" / "5f1c", "train.jsonl")
    with pytest.raises(
        ConfigError, match=r"is a cache of the Hub: name .*/snapshots/5f1c, or hub:org/name"
    ):
        read(root / inside)
    assert read(root / "snapshots" / "5f1c") == ["train.jsonl"]


def test_files_that_are_read_more_than_once_are_named(monkeypatch, tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl", "train.jsonl", "dev.jsonl")
    monkeypatch.chdir(tmp_path)
    once = f"files read more than once: 1 ({tmp_path}/a.jsonl)"
    assert said(f"{tmp_path},./a.jsonl").endswith(once)
    assert said("a.jsonl", held_out=str(tmp_path / "a.jsonl")) == once
    (tmp_path / "c.jsonl").symlink_to("a.jsonl")
    assert said(tmp_path, held_out="dev.jsonl") == once


def test_a_split_that_is_held_out_is_read(tmp_path):
    write(tmp_path, "train.jsonl", "dev.jsonl", "test.jsonl")
    assert said(tmp_path, held_out="validation").endswith("not read: split test: 1 (test.jsonl)")
    assert said(tmp_path, held_out=str(tmp_path / "dev.jsonl")).endswith("(test.jsonl)")
