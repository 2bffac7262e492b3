"""What kind of text a document is, as far as the file says it that it was found in: for those who
compare kinds.
"""

import glob
from pathlib import Path
from typing import NamedTuple

# Of files that are one document each and lie in no folder: their names say nothing of a domain.
TOP_LEVEL = "top level"


class Category(NamedTuple):
    """Two ways of telling texts apart; either is empty where nobody says it."""

    domain: str = ""
    file_type: str = ""


UNSAID = Category()


def find_root(path: str) -> Path:
    """The folder below which all lies that `path`, a file, folder or glob, names."""
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    plain = [folder for folder in place.parents if not glob.has_magic(str(folder))]
    return plain[0]


def find_category(file: Path, root: Path, *, holds_rows: bool) -> Category:
    """By its place and its suffix: the domain is the first folder below `root` on the way to
    `file`; of a file of rows in `root` itself, its name.
    """
    first, *rest = file.relative_to(root).parts
    return Category(first if rest or holds_rows else TOP_LEVEL, file.suffix)
