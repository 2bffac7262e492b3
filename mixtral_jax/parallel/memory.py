"""How much memory a device has."""

import os
from pathlib import Path

import jax

from mixtral_jax.parallel.processes import Processes

# The limit of a container, if there is one: a number of bytes, or `max` (Linux, cgroup v2).
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device_memory(processes: Processes) -> int | None:
    """The bytes that a device has, of all devices the least; None if a back end does not say.

    It is the same number on every process, since all must choose alike by it. Virtual CPU devices
    share the memory of the machine.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        here = machine_memory() // jax.local_device_count()
    else:
        here = (device.memory_stats() or {}).get("bytes_limit", 0)
    return min(processes.share("memory", here)) or None


def machine_memory() -> int:
    """The bytes of memory of this machine, or of the container if that has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CONTAINER_LIMIT.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdecimal() else memory
