"""jax's cache of compiled programs, with other options for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


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
