"""The fingerprint of files: their content and their names below data.path, and nothing else."""

import os
import shutil
import sys

import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data import fingerprint as module
from mixtral_jax.data.fingerprint import fingerprint_data
from mixtral_jax.data.folders import Listing
from tests.data.text_files import write_file


def fingerprint(path, **settings):
    return fingerprint_data(DataConfig(path=str(path), **settings))


def test_the_fingerprint_changes_with_the_files(tmp_path):
    write_file(tmp_path / "a.txt", ["one"])
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path))
    write_file(tmp_path / "a.txt", ["other"])
    changed = fingerprint(str(tmp_path))
    write_file(tmp_path / "b.txt", ["new"])
    assert len({before, changed, fingerprint(str(tmp_path))}) == 3


def test_the_fingerprint_of_the_standard_library_follows_the_python(monkeypatch):
    monkeypatch.setattr(module, "list_source", lambda *_: Listing([], {}))  # Equal files.
    before = fingerprint("python-stdlib")
    assert fingerprint("python-stdlib") == before
    monkeypatch.setattr("platform.python_version", lambda: f"{sys.version_info.major}.99")
    assert fingerprint("python-stdlib") != before


def test_the_fingerprint_covers_every_source(tmp_path):
    for name in "ab":
        write_file(tmp_path / f"{name}.txt", [name])
    path = f"{tmp_path / 'a.txt'}:2,{tmp_path / 'b.txt'}"
    before = fingerprint(path)
    write_file(tmp_path / "b.txt", ["other"])
    assert fingerprint(path) != before


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "here" / "deep").mkdir(parents=True)
    write_file(tmp_path / "here" / "a.jsonl", ["one", "two"])
    write_file(tmp_path / "here" / "deep" / "b.txt", ["three"])
    return tmp_path / "here"


def settle(monkeypatch):
    """Takes every file for one that was not changed of late, so that its hash is kept."""
    monkeypatch.setattr(module, "_SETTLED_SECONDS", -1.0)


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_moved_and_copied_data_keep_their_fingerprint(tmp_path, folder, move):
    before = fingerprint(folder)
    move(folder, tmp_path / "there")
    for file in (tmp_path / "there").rglob("*"):
        os.utime(file, (10**9, 10**9))
    assert fingerprint(tmp_path / "there") == before
    assert fingerprint(f"{tmp_path / 'there'}:2") == before  # Weights draw from the same rows.


@pytest.mark.parametrize("is_kept", [False, True])
def test_content_that_changed_in_place_is_seen_whatever_its_times(monkeypatch, folder, is_kept):
    if is_kept:
        settle(monkeypatch)
    before = fingerprint(folder)
    stat = (folder / "a.jsonl").stat()
    while (folder / "a.jsonl").stat().st_ctime_ns == stat.st_ctime_ns:  # The clock of files ticks.
        write_file(folder / "a.jsonl", ["one", "2wo"])
        os.utime(folder / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = (folder / "a.jsonl").stat()
    assert (after.st_size, after.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert fingerprint(folder) != before


def test_names_that_decide_on_order_domain_or_format_are_part_of_it(folder):
    before = fingerprint(folder)
    (folder / "deep").rename(folder / "other")
    assert fingerprint(folder) != before


def test_what_is_not_read_is_no_part_of_it(folder):
    before = fingerprint(folder)
    write_file(folder / "test.jsonl", ["held out"])
    (folder / "README.md").write_text("words")
    assert fingerprint(folder) == before
    assert fingerprint(folder, held_out="test") != before


def test_files_are_hashed_once(monkeypatch, folder):
    settle(monkeypatch)
    before = fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_hash_file", lambda file: pytest.fail("hashed again"))
        assert fingerprint(folder) == before
    (folder / "a.jsonl").touch()
    assert fingerprint(folder) == before


def test_a_hash_that_was_cut_short_is_made_again(monkeypatch, cache_dir, folder):
    settle(monkeypatch)
    before = fingerprint(folder)
    for kept in cache_dir.glob("*.content"):
        kept.write_text("")
    assert fingerprint(folder) == before


def test_a_file_that_changed_just_now_is_hashed_again(cache_dir, folder):
    fingerprint(folder)
    assert not cache_dir.exists()  # A change within one tick of the clock would not be seen.


def test_a_file_that_cannot_be_read_is_a_config_error(monkeypatch, folder):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hashlib.file_digest", refuse)
    with pytest.raises(ConfigError, match=r"here/a.jsonl cannot be read \(Permission denied\): "):
        fingerprint(folder)
