"""The split of a data set that a file or folder holds, judged by its name.

The words are those of `datasets`. `folders` decides which splits are read.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.data.compression import without_compression

TRAIN = "train"

_ROLES = {
    TRAIN: (TRAIN, "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ROLE_BY_WORD = {word: role for role, words in _ROLES.items() for word in words}
# Words by which people call what they do not train on, and that `datasets` does not know.
_DOUBTFUL = {
    *("heldout", "holdout", "unseen", "development", "devel", "tst", "tests"),
    *(f"{word}set" for words in (_ROLES["validation"], _ROLES["test"]) for word in words),
}
# What follows the name of a split in `train-00000-of-00002.parquet`, perhaps with a hash.
_SHARD = re.compile(r"[-.](\d+)-of-(\d+).*")
_MAX_SHARD_DIGITS = 5  # Longer ones are dates and the like.


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set.

    Attributes:
        name: such as `train_sft`, or only the role.
        role: `train`, `validation` or `test`; of a name that says none of these, the name.
    """

    name: str
    role: str

    def is_called(self, name: str) -> bool:
        """Whether a user who writes `name` may mean this split: `dev` means `validation`."""
        return name in (self.name, self.role) or _ROLE_BY_WORD.get(name) == self.role


@dataclasses.dataclass(frozen=True)
class SplitOfFile:
    """A split, and the file's name without its word: equal for files of two splits of one set."""

    split: Split
    rest: str


def name_split(name: str) -> Split:
    """The split of a given name; its role is the first or the last word of the name."""
    word = _find_word(name)
    return Split(name, _ROLE_BY_WORD[word.group().lower()] if word else name)


def split_of_folder(name: str) -> Split | None:
    """The split that a folder holds, if its whole name is a word such as `test`."""
    role = _ROLE_BY_WORD.get(name.lower())
    return Split(role, role) if role else None


def splits_of_folders(names: Sequence[str]) -> dict[str, Split | None]:
    """The splits that folders beside each other hold: also those of `data_train` and `data_test`,
    whose names differ in that word alone.
    """
    named = {name: _split_of_name(name) for name in names}
    trained = {found.rest for found in named.values() if found and found.split.role == TRAIN}
    return {
        name: found.split if found and found.rest in trained else split_of_folder(name)
        for name, found in named.items()
    }


def looks_held_out(path: Path) -> bool:
    """Whether a file, or a folder that it lies in, seems to be called for what is held out."""
    for name in (*path.parts[:-1], without_compression(path).stem):
        words = [word.lower() for word in re.findall("[A-Za-z]+", name)]
        ends = {*words[:1], *words[-1:], "".join(words[:2]), "".join(words[-2:])}
        roles = {_ROLE_BY_WORD.get(word, TRAIN) for word in ends}
        if TRAIN not in map(_ROLE_BY_WORD.get, ends) and (roles - {TRAIN} or ends & _DOUBTFUL):
            return True
    return False


def split_of_file(file: Path) -> SplitOfFile | None:
    """The split that a file holds, if the first or the last word of its name is one.

    Shards may name splits of their own, as in `train_sft-00000-of-00003.parquet`.
    """
    return _split_of_name(without_compression(file).stem)


def _split_of_name(stem: str) -> SplitOfFile | None:
    name = _SHARD.sub("", stem)
    word = _find_word(name)
    if word is None:
        return None
    role = _ROLE_BY_WORD[word.group().lower()]
    has_own_name = name != stem and word.start() == 0
    rest = f"{name[: word.start()]}*{name[word.end() :]}"
    return SplitOfFile(Split(name if has_own_name else role, role), rest)


def find_missing_shards(files: Sequence[Path]) -> list[Path]:
    """The shards that are not among `files` though others of their set are, named without what may
    follow their number.
    """
    numbers_by_set: dict[tuple[Path, str], set[int]] = collections.defaultdict(set)
    for file in files:
        shard = _SHARD.search(file.name)
        if shard and len(shard[2]) <= _MAX_SHARD_DIGITS:
            numbers_by_set[file.with_name(file.name[: shard.start(1)]), shard[2]].add(int(shard[1]))
    missing = []
    for (start, total), numbers in numbers_by_set.items():
        first = int(int(total) in numbers)  # Some programs count from 1.
        left = sorted({*range(first, first + int(total))} - numbers)
        missing += [start.with_name(f"{start.name}{n:0{len(total)}}-of-{total}") for n in left]
    return missing


def _find_word(name: str) -> re.Match[str] | None:
    """The word of a split in a name; a part of the training split may be called `train_dev`."""
    words = list(re.finditer("[A-Za-z]+", name))
    found = [word for word in (*words[:1], *words[-1:]) if word.group().lower() in _ROLE_BY_WORD]
    return min(found, key=lambda word: _ROLE_BY_WORD[word.group().lower()] == TRAIN, default=None)
