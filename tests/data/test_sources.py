"""Every form of `data.path`: files, folders, globs, datasets and several sources."""

import os

import datasets
import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.data.documents import Document, read_documents
from mixtral_jax.data.sources import Source, find_weights, split_sources
from tests.data.text_files import texts, write_file


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    (tmp_path / "inner").mkdir()
    write_file(tmp_path / "inner" / "b.txt", ["second"])
    write_file(tmp_path / "a.jsonl", ["first"])
    write_file(tmp_path / "z.txt", ["third"])
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden").mkdir()
    write_file(tmp_path / ".hidden" / "a.txt", ["not read"])
    assert texts(tmp_path) == ["first", "second", "third"]


def test_a_glob_picks_files(tmp_path):
    for name in ("a1.txt", "a2.txt", "b.txt"):
        write_file(tmp_path / name, [name])
    assert texts(tmp_path / "a*.txt") == ["a1.txt", "a2.txt"]


def test_a_saved_dataset_is_read_without_its_bookkeeping(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["a", "b"]


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwhole\n\nfile")
    assert texts(tmp_path / "a.txt") == ["whole\n\nfile"]


def test_the_standard_library_is_code_without_tests_or_packages():
    rows = list(read_documents("python-stdlib", "text"))
    assert all(isinstance(row, Document) for row in rows)
    origins = [row.origin for row in rows]
    assert origins == sorted(origins, key=lambda origin: origin.split("/"))
    assert any(origin.endswith("/argparse.py") for origin in origins)
    assert not any("/test/" in origin or "-packages/" in origin for origin in origins)


@pytest.mark.parametrize(
    ("path", "skipped"), [("python-stdlib", "site-packages"), (".", ".hidden")]
)
def test_skipped_folders_are_not_entered(tmp_path, monkeypatch, path, skipped):
    (tmp_path / skipped / "deep").mkdir(parents=True)
    for file in ("a.py", "a.txt", f"{skipped}/b.py", f"{skipped}/b.txt"):
        (tmp_path / file).write_text("text")
    entered = []
    scandir = os.scandir
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("os.scandir", lambda folder: entered.append(str(folder)) or scandir(folder))
    monkeypatch.chdir(tmp_path)
    assert texts(path) == ["text"]
    assert len(entered) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.txt", "does not exist: name a file"),
        ("pipe.txt", "is neither a file nor a folder: name a file"),
        ("absent*.txt", "holds no readable file"),
        ("empty", "holds no readable file: it must hold at least one of .txt"),
        ("notes.md", "is none of .txt"),
    ],
)
def test_a_path_without_documents_is_a_config_error_at_once(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match=message) as error:
        read_documents(str(tmp_path / name), "text")
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "sources", "weights"),
    [
        ("a.txt", [Source("a.txt")], None),
        ("a.txt, b", [Source("a.txt"), Source("b")], None),
        ("a.txt:2,b:0.5", [Source("a.txt", 2.0), Source("b", 0.5)], [2.0, 0.5]),
        ("hub:x/y:train:3,hub:z", [Source("hub:x/y:train", 3.0), Source("hub:z", 1.0)], [3.0, 1.0]),
        ("hub:7", [Source("hub:7")], None),
    ],
)
def test_sources_and_their_weights_are_told_apart(path, sources, weights):
    assert split_sources(path) == sources
    assert find_weights(path) == weights


def test_a_name_that_exists_is_one_source_whatever_is_in_it(tmp_path):
    write_file(tmp_path / "a,b:2.txt", ["text"])
    assert split_sources(str(tmp_path / "a,b:2.txt")) == [Source(str(tmp_path / "a,b:2.txt"))]
    (tmp_path / "c:3").mkdir()
    assert find_weights(f"{tmp_path / 'c:3'},d") is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a,,b", "empty source"),
        ("a,b:2,a", "names a twice"),
        ("a:0,b", "positive"),
        ("a:-1,b", "positive"),
        ("a:nan,b", "positive"),
        ("a:inf,b", "positive"),
    ],
)
def test_sources_that_make_no_sense_are_a_config_error(path, words):
    with pytest.raises(ConfigError, match=words):
        split_sources(path)
