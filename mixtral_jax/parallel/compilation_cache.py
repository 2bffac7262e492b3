"""jax's cache of compiled programs: where it is kept, and other options of it for a while."""

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# Programs that compile faster than this are not worth a file.
_MIN_COMPILE_SECONDS = 0.3
# When all files together are larger, jax removes those that were not used for longest.
_MAX_CACHE_BYTES = 4 * 2**30


def keep_compiled_programs(folder: Path) -> None:
    """Lets jax keep compiled programs under `folder`, so that the next start of a run is fast.

    A program for a CPU holds instructions that another CPU may lack, so each kind of CPU has a
    folder of its own. A cache that the environment names (`JAX_COMPILATION_CACHE_DIR`) is used
    instead, as it is.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    _update(
        {
            "jax_compilation_cache_dir": str(folder / _name_cpu()),
            "jax_compilation_cache_max_size": _MAX_CACHE_BYTES,
            "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_SECONDS,
        }
    )


def _name_cpu() -> str:
    """A name for this kind of CPU, which another kind does not have."""
    described = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):  # Only Linux lists the instructions of a CPU.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:16]


@contextlib.contextmanager
def compilation_cache_options(**options: Any) -> Iterator[None]:
    """Sets options of jax (by their names in `jax.config`) while the block runs."""
    before = {name: getattr(jax.config, name) for name in options}
    _update(options)
    try:
        yield
    finally:
        _update(before)


def _update(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    # jax reads the options when it first compiles, and again after this.
    compilation_cache.reset_cache()
