"""A folder that appears when it is complete, and not at all if something goes wrong."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtral_jax.config import ConfigError, require


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
    """A temporary folder beside `path`, which takes its place at the end; deleted if the block
    raises.

    Args:
        mark: makes its name; several processes that fill it, on storage which all of them see, give
            the same.
        is_writer: whether this process is the one that moves it, at the end of its block.

    Raises:
        SystemExit: code 1, with a line; a file cannot be written.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{mark or make_mark()}.partial")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        if is_writer:
            temporary.replace(path)
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be written: {error}") from error
    finally:
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)


def make_mark() -> str:
    """A mark for a temporary folder that no other has."""
    return secrets.token_hex(4)
