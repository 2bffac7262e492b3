"""How much memory a device has: the same on every process, and no more than a container may use."""

from unittest.mock import Mock

import jax
import pytest

from mixtral_jax.parallel import memory
from mixtral_jax.parallel.memory import device_memory, machine_memory


@pytest.mark.parametrize(("others", "expected"), [([], 100), ([40], 40), ([300], 100), ([0], None)])
def test_all_processes_know_of_the_least_memory_or_of_none(monkeypatch, others, expected):
    monkeypatch.setattr(memory, "machine_memory", lambda: 100 * jax.local_device_count())
    processes = Mock(share=lambda name, here: [here, *others])
    assert device_memory(processes) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [("4096\n", 4096), ("max\n", None), (f"{2**80}\n", None), (None, None)]
)
def test_a_container_has_the_memory_of_its_limit_if_that_is_less(
    monkeypatch, tmp_path, limit, expected
):
    monkeypatch.setattr(memory, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    whole = machine_memory()
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    assert machine_memory() == (expected or whole)
