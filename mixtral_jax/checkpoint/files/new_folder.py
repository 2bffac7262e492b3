"""Writes a folder whole or not at all: it appears under its name when it is complete."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtral_jax.config import ConfigError, require
from mixtral_jax.whole_files import whole_folder


def require_room(path: Path, num_bytes: int) -> None:
    """Checks that a folder of `num_bytes` can be created at `path`.

    Raises:
        ConfigError: something is there already, or the disk has too little space.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        is_free = not path.is_symlink() and (not path.exists() or not any(path.iterdir()))
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be created: {error}; name a folder that can be written"
        ) from None
    require(
        above.is_dir(),
        f"{path} cannot be created: {above} is not a folder; name a folder that can be written",
    )
    require(is_free, f"{path} exists already: name a new folder, or delete that one")
    require(
        free > num_bytes,
        f"{path} needs {num_bytes / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB free: free "
        "some space, or name a folder on another disk",
    )


@contextlib.contextmanager
def new_folder(path: Path, mark: str | None = None, *, is_writer: bool = True) -> Iterator[Path]:
    """`whole_folder` for a command: an error ends it with one line.

    Raises:
        SystemExit: code 1; a file or the folder cannot be written.
    """
    try:
        # Not flushed: to wait for the disk would double the time of a copy of weights, which can be
        # made again.
        with whole_folder(path, mark, is_writer=is_writer, is_flushed=False) as temporary:
            yield temporary
    except OSError as error:
        raise SystemExit(f"error: {path.absolute()} cannot be written: {error}") from error
