"""The sources of this Python's standard library: text that every machine has."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral_jax.config import require

# Beside code worth learning from, it holds installed packages, its own tests, and modules that are
# tables written out by a program.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}


def stdlib_root() -> Path:
    """The folder whose files and packages are its modules."""
    return Path(sysconfig.get_path("stdlib"))


def list_stdlib() -> list[Path]:
    """Its files, sorted.

    Raises:
        ConfigError: this Python was installed without them.
    """
    root = stdlib_root()
    # Some `__init__.py` are empty on purpose: nothing to learn, and nothing to warn about.
    found = walk(root, _SKIPPED.__contains__)
    files = sorted(file for file in found if file.suffix == ".py" and file.stat().st_size > 1)
    require(
        files,
        f"data.path: this Python has no .py sources under {root}; name a file or a folder instead "
        "of its library",
    )
    return files


def walk(root: Path, is_skipped: Callable[[str], bool]) -> Iterator[Path]:
    """The files in and below `root`, without entering folders of a skipped name: they may hold
    millions.
    """
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_skipped(name)]
        yield from (Path(folder, name) for name in files if not is_skipped(name))
