"""The files that a path names, and what lies beside them and is not read.

In a folder, the training split of a data set is told from its other splits (`splits`). `sources`
reads the files.
"""

import collections
import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from mixtral_jax.config import ConfigError, local_path, require
from mixtral_jax.data.compression import find_suffix
from mixtral_jax.data.domains import find_root
from mixtral_jax.data.not_read import NotRead, describe, find_reasons, is_readable, refuse_hub_cache
from mixtral_jax.data.readers import READERS
from mixtral_jax.data.splits import (
    TRAIN,
    Split,
    find_missing_shards,
    looks_held_out,
    name_split,
    split_of_file,
    splits_of_folders,
)

_NAME_A_PATH = "name a path in data.held_out"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files that a path names, in the order in which they are read.

    Attributes:
        not_read: what is beside them.
        doubtful: those of the files whose names look as if they were to be held out.
    """

    files: list[Path]
    not_read: NotRead
    doubtful: Sequence[Path] = ()


@dataclasses.dataclass(frozen=True)
class _File:
    """A file that can be read, and the split that it belongs to, if any."""

    path: Path
    split: Split | None


@dataclasses.dataclass(frozen=True)
class _Inside:
    """The splits that files in a folder belong to: those that hold rows, and those that hold text.

    The name of a text says what it is about, as in a folder of source files: it is part of a split
    only if the training split is beside it, under a name that differs in one word.
    """

    of_rows: Split | None = None
    of_texts: Split | None = None

    def narrow(self, split: Split | None, *, is_of_texts: bool) -> "_Inside":
        """The splits in a part of the folder that is called `split`; a test split stays one."""
        rows, texts = (
            split or outer if outer is None or outer.role == TRAIN else outer
            for outer in (self.of_rows, self.of_texts)
        )
        return _Inside(rows, texts if is_of_texts else self.of_texts)


def list_files(path: str, key: str, suffixes: str | None, split: str | None) -> Listing:
    """Lists the files of a file, folder or glob.

    Args:
        key: the setting that gives the path, for the message of an error.
        suffixes: which files to read, as in `DataConfig`.
        split: which split of a folder to read; files of no split count as `train`. None reads all
            files, unless a training split is beside others.

    Raises:
        ConfigError: there is no file to read, or not that split.
    """
    name, place = f"{key}={path}", local_path(path, key)
    readable = suffixes.lower().split(",") if suffixes else [".txt", *READERS]
    if place.is_file():
        require(
            is_readable(place, readable),
            f"{name} is none of {', '.join(readable)}: convert it, or if it is text, add its "
            "suffix to data.suffixes",
        )
        require(
            split in (TRAIN, None), f"{name} is a file: it has no split {split}; {_NAME_A_PATH}"
        )
        return Listing([place], {})
    not_read: NotRead = collections.defaultdict(list)
    if place.is_dir():
        files = _choose_split(list(_walk(place, readable, not_read, name)), split, name, not_read)
        if missing := find_missing_shards(files):
            not_read["missing shards"] = missing
    else:
        problem = "is neither a file nor a folder" if place.exists() else "does not exist"
        require(
            glob.has_magic(path),
            f"{name} {problem}: name a file, folder, glob, hub:NAME or python-stdlib",
        )
        require(
            split in (TRAIN, None), f"{name} is a glob: it has no split {split}; {_NAME_A_PATH}"
        )
        files = list(_match(place, readable, not_read))
    beside = f" (not read: {describe(not_read, find_root(path))})" if not_read else ""
    require(
        files,
        f"{name} holds no readable file: it must hold at least one of {', '.join(readable)}; "
        f"data.suffixes can name others{beside}",
    )
    files = list(_keep_one_name(sorted(files), not_read))
    is_trained_on = place.is_dir() and split == TRAIN
    return Listing(files, not_read, _find_doubtful(files, place) if is_trained_on else ())


def _keep_one_name(files: Sequence[Path], not_read: NotRead) -> Iterator[Path]:
    """The files without those that are hard links to one before them.

    A symbolic link stays: whoever makes one may want a file to be read more than once.
    """
    seen: set[tuple[int, int]] = set()
    for file in files:
        status = file.lstat()
        if (status.st_dev, status.st_ino) in seen:
            not_read["hard links to files that are read"].append(file)
        else:
            seen.add((status.st_dev, status.st_ino))
            yield file


def _find_doubtful(files: Sequence[Path], root: Path) -> list[Path]:
    """The files that are not known as those of another split, but may be."""
    doubtful = [file for file in files if looks_held_out(file.relative_to(root))]
    if any(split_of_file(file) for file in files if file not in doubtful):
        return doubtful
    # The name of a text may say what it is about, unless a training split is beside it.
    return [file for file in doubtful if find_suffix(file) in READERS]


def _match(place: Path, readable: Sequence[str], not_read: NotRead) -> Iterator[Path]:
    """The files that a glob matches."""
    names_by_folder: dict[Path, list[str]] = {}
    for matched in map(Path, glob.glob(str(place), recursive=True)):
        names_by_folder.setdefault(matched.parent, []).append(matched.name)
    for folder, names in names_by_folder.items():
        for name, reason in find_reasons(folder, names, readable).items():
            if reason is None:
                yield folder / name
            elif not (folder / name).is_dir():
                not_read[reason].append(folder / name)
            elif "**" not in str(place):  # Which matches all folders on the way to files.
                not_read["folders"].append(folder / name)


def _walk(root: Path, readable: Sequence[str], not_read: NotRead, name: str) -> Iterator[_File]:
    """The readable files in and below a folder, each with its split.

    It does not enter hidden folders, which may hold millions of files.
    """

    def refuse(error: OSError) -> NoReturn:
        reason = f"{error.strerror or error}: {error.filename}"
        raise ConfigError(f"{name} cannot be read ({reason}): change permissions") from error

    insides = {root: _Inside()}
    for entry, folders, names in os.walk(root, onerror=refuse):
        folder = Path(entry)
        refuse_hub_cache(folder, folders, name)
        inside = insides.pop(folder)
        for other in [*folders]:
            if other.startswith(".") or (folder / other).is_symlink():
                folders.remove(other)
                reason = "hidden" if other.startswith(".") else "linked folders"
                not_read[reason].append(folder / other)
        is_saved = "dataset_dict.json" in names
        splits = splits_of_folders(folders)
        if is_saved:
            splits = {other: name_split(other) for other in folders}
        has_train = any(split and split.role == TRAIN for split in splits.values())
        for other, split in splits.items():
            insides[folder / other] = inside.narrow(split, is_of_texts=is_saved or has_train)
        yield from _find_files(folder, names, readable, inside, not_read)


def _find_files(
    folder: Path, names: list[str], readable: Sequence[str], inside: _Inside, not_read: NotRead
) -> Iterator[_File]:
    """The readable files in a folder, each with its split."""
    files = []
    for name, reason in find_reasons(folder, names, readable).items():
        if reason is None:
            files.append(folder / name)
        else:
            not_read[reason].append(folder / name)
    named = {file: split_of_file(file) for file in files}
    trained = {found.rest for found in named.values() if found and found.split.role == TRAIN}
    for file, found in named.items():
        split = found.split if found else None
        own = inside.narrow(split, is_of_texts=found is not None and found.rest in trained)
        yield _File(file, own.of_rows if find_suffix(file) in READERS else own.of_texts)


def _choose_split(
    found: Sequence[_File], wanted: str | None, name: str, not_read: NotRead
) -> list[Path]:
    """The files of a split; notes the others.

    Raises:
        ConfigError: there is no such split, or several could be meant.
    """
    splits = {file.split or Split(TRAIN, TRAIN) for file in found}
    names = ", ".join(sorted(split.name for split in splits))
    if wanted is None:
        roles = {file.split.role for file in found if file.split}
        require(
            TRAIN not in roles or len(roles) == 1,
            f"{name} holds the splits {names}: name the files or the folder of one",
        )
        return [file.path for file in found]
    meant = {split for split in splits if split.name == wanted}
    meant = meant or {split for split in splits if split.is_called(wanted)}
    require(
        meant or not found or wanted != TRAIN,
        f"{name} holds no training split, only {names}: to train on it, name its files or its "
        "folder",
    )
    require(
        meant or not found,
        f"{name} has no split {wanted}, only {names}: name one of these, or a path, in "
        "data.held_out",
    )
    require(
        len(meant) <= 1,
        f"{name} has several splits that {wanted} may mean: "
        f"{', '.join(sorted(split.name for split in meant))}: name the files of one, as in "
        "'FOLDER/NAME-*'",
    )
    chosen = []
    for file in found:
        split = file.split or Split(TRAIN, TRAIN)
        if split in meant:
            chosen.append(file.path)
        else:
            not_read[f"split {split.name}"].append(file.path)
    return chosen
