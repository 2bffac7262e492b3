"""Files and folders that appear whole or not at all."""

import json
import os
import threading
from pathlib import Path

import pytest

from mixtral_jax.whole_files import whole_file, whole_folder, write_json, write_whole


def test_content_replaces_what_was_there(tmp_path: Path) -> None:
    write_whole(path := tmp_path / "file", b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_whole(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert os.listdir(tmp_path) == ["file"]


def test_failure_in_the_middle_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError, match="full"), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise ValueError("full")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_failure_to_rename_is_an_oserror_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "content")
    assert os.listdir(tmp_path) == ["folder"]


def test_missing_folder_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", "content")


def test_content_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_whole(tmp_path / "file", "content")
    assert events == ["flush", "rename", "flush"]


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [letter * 100_000 for letter in "ab"]
    found = set()

    def write(content: str) -> None:
        for _ in range(20):
            write_whole(path, content)
            found.add(path.read_text())

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found <= set(contents) and found
    assert os.listdir(tmp_path) == ["file"]


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    write_json(path, {"path": str(path.name), "word": "é"})
    assert path.read_text() == '{\n  "path": "caf\\udce9",\n  "word": "é"\n}\n'
    assert json.loads(path.read_text())["path"] == path.name
    assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9"]


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "above" / "folder"
    with whole_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("content")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "content"
    assert os.listdir(path.parent) == ["folder"]


def test_folder_does_not_appear_if_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="full"), whole_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("content")
        raise ValueError("full")
    assert os.listdir(tmp_path) == []


def test_folder_never_replaces_one_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError), whole_folder(tmp_path / "folder") as temporary:
        (temporary / "new").touch()
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["old"]


def test_only_the_writer_of_a_shared_folder_moves_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder", "mark") as first:
        with whole_folder(tmp_path / "folder", "mark", is_writer=False) as second:
            assert second == first
        assert second.exists()
    assert os.listdir(tmp_path) == ["folder"]
