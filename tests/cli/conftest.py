"""Verbs that run in the process of the tests leave it as it was."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def precision_stays() -> Iterator[None]:
    """Undoes what a float32 model sets for the whole process: the precision of matmuls."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)
