"""A fingerprint of the content of all files that a config names, wherever they lie.

Data that were moved or copied keep theirs. Files are hashed once: later runs recognize them by
place, size and times, one of which (`st_ctime`) no program can set back.
"""

import concurrent.futures
import hashlib
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.cache import default_cache_dir
from mixtral_jax.data.domains import find_root
from mixtral_jax.data.hub import HUB
from mixtral_jax.data.sources import STDLIB, STDLIB_CHAT, Source, all_sources, list_source
from mixtral_jax.data.stdlib import stdlib_root
from mixtral_jax.whole_files import write_whole

# A file that was changed within this time may change again without another time of change.
_SETTLED_SECONDS = 2.0


def fingerprint_data(config: DataConfig) -> str:
    """Hashes, in hex, the contents of all files and their names below the path that names them.

    Raises:
        ConfigError: there is nothing to read, or a file cannot be read.
    """
    digest = hashlib.sha256()
    for source in all_sources(config):
        described = (
            f"{source.split} {_name_version(source)} {_hash_source(source, config.suffixes)}"
        )
        digest.update(f"{described}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _name_version(source: Source) -> str:
    """What else than its files decides on the rows of a source."""
    if source.path.startswith(HUB):
        return source.path
    return platform.python_version() if source.path in (STDLIB, STDLIB_CHAT) else ""


def _hash_source(source: Source, suffixes: str | None) -> str:
    files = [(_name_below(source.path, file), file) for file in list_source(source, suffixes).files]
    known, newest = hashlib.sha256(), 0.0
    for name, file in files:
        stat = file.stat()
        newest = max(newest, stat.st_mtime, stat.st_ctime)
        times = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        known.update(f"{name}\n{file.absolute()}\n{times}\n".encode(errors="surrogateescape"))
    memory = default_cache_dir() / f"{known.hexdigest()[:32]}.content"
    kept = memory.read_text() if memory.exists() else ""
    if len(kept) == 2 * known.digest_size:
        return kept
    content = _hash_files(files)
    if time.time() - newest > _SETTLED_SECONDS:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, content)
    return content


def _name_below(path: str, file: Path) -> str:
    """The name of a file below what names it, from which its domain and type are judged."""
    if path.startswith(HUB):
        return file.name
    root = stdlib_root() if path in (STDLIB, STDLIB_CHAT) else find_root(path)
    return file.relative_to(root).as_posix()


def _hash_files(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # Several files are hashed at once.
        for (name, _), content in zip(files, pool.map(_hash_file, files), strict=True):
            digest.update(f"{name}\n{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _hash_file(named: tuple[str, Path]) -> str:
    _, file = named
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror or error}): mend it, or move it out of "
            "data.path"
        ) from error
