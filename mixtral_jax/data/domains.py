"""What kind of text a document is, as far as the place says it where it was found: for those who compare kinds."""

import glob
from pathlib import Path

# Files that are one document each: their names say nothing of a kind.
_WHOLE_TEXTS = (".txt", ".py")


def find_root(path: str) -> Path:
    """The folder below which all lies that `path`, a file, folder or glob, names."""
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    plain = [folder for folder in place.parents if not glob.has_magic(str(folder))]
    return plain[0]


def name_domain(file: Path, root: Path) -> str:
    """The first folder below `root` on the way to `file`; of a file in `root` itself, its name, or `*.txt`, `*.py`."""
    first, *rest = file.relative_to(root).parts
    return first if rest or file.suffix not in _WHOLE_TEXTS else f"*{file.suffix}"
