"""A file under two names, or twice in one folder, is read once and named; what differs is read."""

import bz2
import gzip
import lzma
import os

import pyarrow
import pytest

from mixtral_jax.config import DataConfig
from mixtral_jax.data.sources import Source, describe_files, list_source


def compress_zst(content):
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": compress_zst,
}
# Longer than what is compared at once.
LONG = b"\n".join(b'{"text": "row %d"}' % number for number in range(70_000))


def read(path, **settings):
    return [file.name for file in list_source(Source(str(path)), **settings).files]


def said(path, **settings):
    return "\n".join(describe_files(DataConfig(path=str(path), **settings)))


@pytest.mark.parametrize(
    "suffixes", [("", ".gz"), ("", ".zst"), ("", ".bz2"), (".gz", ".xz"), ("", ".gz", ".zst")]
)
@pytest.mark.parametrize("stem", ["a.txt", "a.jsonl", "A.JSONL"])
@pytest.mark.parametrize("content", [b'{"text": "a"}', LONG], ids=["short", "long"])
def test_a_copy_in_another_compression_is_not_read_and_named(tmp_path, stem, suffixes, content):
    for suffix in suffixes:
        (tmp_path / f"{stem}{suffix}").write_bytes(COMPRESS[suffix](content))
    first, *copies = (f"{stem}{suffix}" for suffix in suffixes)
    assert read(tmp_path) == [first]
    assert f"compressed copies: {len(copies)} ({', '.join(copies)})" in said(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        gzip.compress(LONG + b"\n"),
        gzip.compress(LONG[:-1]),
        gzip.compress(b"x" + LONG[1:]),
        gzip.compress(LONG)[:-9],  # Damaged, which its reader then says.
        b"no gzip",
    ],
)
def test_a_file_of_the_same_name_with_other_content_is_read_too(tmp_path, other):
    (tmp_path / "a.jsonl").write_bytes(LONG)
    (tmp_path / "a.jsonl.gz").write_bytes(other)
    assert read(tmp_path) == ["a.jsonl", "a.jsonl.gz"]
    assert said(tmp_path) == ""


def test_a_copy_that_changes_between_two_listings_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    assert read(tmp_path) == ["a.txt"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"another"))
    assert read(tmp_path) == ["a.txt", "a.txt.gz"]


@pytest.mark.parametrize(
    ("names", "linked"),
    [
        (["a.jsonl", "b.jsonl"], ["b.jsonl"]),
        (["a.txt", "b/a.txt", "c/d/e.txt"], ["b/a.txt", "c/d/e.txt"]),
        (["train.jsonl", "test.jsonl"], []),  # Only the training split is read.
    ],
)
@pytest.mark.parametrize("pattern", ["", "**/*"])
def test_hard_links_to_one_file_are_read_once_and_named(tmp_path, names, linked, pattern):
    if pattern and "test.jsonl" in names:
        linked = ["train.jsonl"]  # A glob reads what it matches, whatever split that is of.
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name == names[0]:
            (tmp_path / name).write_bytes(b'{"text": "a"}')
        else:
            os.link(tmp_path / names[0], tmp_path / name)
    path = tmp_path / pattern if pattern else tmp_path
    assert len(read(path)) == 1
    expected = f"hard links to files that are read: {len(linked)} ({', '.join(linked)})"
    assert (expected in said(path)) == bool(linked)
    assert "read more than once" not in said(path)


def test_a_hard_link_in_another_source_is_named_as_read_twice(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    os.link(tmp_path / "one" / "a.txt", tmp_path / "other" / "b.txt")
    path = f"{tmp_path / 'one'},{tmp_path / 'other'}"
    assert said(path) == f"files read more than once: 1 ({tmp_path}/one/a.txt)"
    assert said(tmp_path / "one", held_out=str(tmp_path / "other")).startswith("files read more")


@pytest.mark.parametrize("copy", ["b.jsonl", "a copy.jsonl", "deep/a.jsonl"])
def test_files_of_rows_with_the_same_bytes_are_read_and_named(tmp_path, copy):
    (tmp_path / copy).parent.mkdir(exist_ok=True)
    for name, text in ((copy, "a"), ("a.jsonl", "a"), ("z.jsonl", "z")):
        (tmp_path / name).write_text(f'{{"text": "{text}"}}')
    assert len(read(tmp_path)) == 3
    first, second = sorted([tmp_path / "a.jsonl", tmp_path / copy])
    assert said(tmp_path) == (
        f"files that hold what another one holds, and are read too: 1 ({second} is {first})"
    )


def test_texts_with_the_same_bytes_are_documents_like_others(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a licence")
    assert said(tmp_path) == ""
