"""A folder that appears when it is complete, and not at all if something goes wrong."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtral_jax.config import ConfigError, require
from mixtral_jax.whole_files import whole_folder


def require_room(path: Path, num_bytes: int) -> None:
    """Makes sure that a folder of `num_bytes` can be made at `path`.

    Raises:
        ConfigError: something lies there already, or the disk is too full.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        is_free = not path.is_symlink() and (not path.exists() or not any(path.iterdir()))
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error}") from None
    require(above.is_dir(), f"{path} cannot be made: {above} is no folder")
    require(is_free, f"{path} exists: name a new folder, or delete that one")
    require(
        free > num_bytes,
        f"{path} needs {num_bytes / 1e9:,.1f} GB, and its disk has {free / 1e9:,.1f} GB free",
    )


@contextlib.contextmanager
def new_folder(path: Path, mark: str | None = None, *, is_writer: bool = True) -> Iterator[Path]:
    """`whole_folder` for a command: an error ends it with one line.

    Raises:
        SystemExit: code 1; a file or the folder cannot be written.
    """
    try:
        with whole_folder(path, mark, is_writer=is_writer) as temporary:
            yield temporary
    except OSError as error:
        raise SystemExit(f"error: {path.absolute()} cannot be written: {error}") from error
