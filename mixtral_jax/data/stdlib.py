"""The source files of this Python's standard library: text that is on every machine."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral_jax.config import require

# Installed packages, tests, and modules that are generated tables.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}


def stdlib_root() -> Path:
    """Finds the folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def list_stdlib() -> list[Path]:
    """Lists its source files, sorted.

    Raises:
        ConfigError: this Python was installed without source files.
    """
    root = stdlib_root()
    # Some `__init__.py` are empty on purpose; they would only be reported as bad rows.
    found = walk(root, _SKIPPED_FOLDERS.__contains__)
    files = sorted(file for file in found if file.suffix == ".py" and file.stat().st_size > 1)
    require(
        files,
        f"data.path=python-stdlib: this Python has no .py files in {root}: name a file or folder "
        "instead",
    )
    return files


def walk(root: Path, is_skipped: Callable[[str], bool]) -> Iterator[Path]:
    """Finds the files in and below `root`.

    It does not enter folders whose names are skipped, which may hold millions of files.
    """
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_skipped(name)]
        yield from (Path(folder, name) for name in files if not is_skipped(name))
