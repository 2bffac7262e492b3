"""What kind of text a document is, judged by the file that it was read from.

`analyze` compares the routing of these kinds.
"""

import glob
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.config import local_path
from mixtral_jax.data.compression import find_suffix

# The domain of files that hold one document each and are in no folder below the root.
TOP_LEVEL = "top level"


class Category(NamedTuple):
    """Two ways to tell texts apart; each is empty if it is not known."""

    domain: str = ""
    file_type: str = ""


UNKNOWN = Category()


def find_root(path: str) -> Path:
    """Finds the folder that contains everything that `path`, a file, folder or glob, names."""
    place = local_path(path, "data.path")
    if place.is_dir():
        return place
    plain = [folder for folder in place.parents if not glob.has_magic(str(folder))]
    return plain[0]


def find_category(file: Path, root: Path, *, holds_rows: bool) -> Category:
    """Judges the kind of text in a file by its place and suffix.

    The domain is the first folder below `root` on the way to `file`. For a file of rows directly in
    `root`, it is the name of the file.
    """
    first, *rest = file.relative_to(root).parts
    return Category(first if rest or holds_rows else TOP_LEVEL, find_suffix(file))
