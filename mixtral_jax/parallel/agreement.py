"""Checks that the processes of a run agree: on the config, the software, the devices and the data.

Processes that differ compile different programs, and then wait for each other forever. So each
process sends what it is to all others, before it touches a device. All processes then compare the
same table, and stop with the same line if anything differs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.parallel.processes import Processes

# The processes introduce themselves right after they join, so only a stalled host takes long. The
# devices of a large pod may take minutes to come up.
_INTRODUCE_TIMEOUT_SECONDS = 60.0
_DEVICES_TIMEOUT_SECONDS = 300.0

# Another release of one of these may change what is computed, compiled or read.
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "sentencepiece",
    "numpy",
)
# A host that lacks one of these, while others have it, chooses another kernel or the CPU.
_OPTIONAL_PACKAGES = ("tokamax", "libtpu", "jax-cuda12-plugin")
_MAX_SHOWN_KEYS = 5
_MAX_SHOWN_PROCESSES = 4
_SOURCE_HASH_DIGITS = 12

# The fixes that error messages name.
ALIKE = "start all with the same command, code and environment"
EQUAL = "give every process the same number of devices of one kind"


@dataclasses.dataclass(frozen=True)
class Member:
    """What one process is, before it touches a device."""

    index: int
    host: str
    pid: int
    workdir: str | None
    config: str  # SHA-256 of the config as given, in hex
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class LocalDevices:
    """The devices of one process."""

    platform: str
    kind: str
    count: int


def introduce(processes: Processes, config: Config, workdir: Path | None) -> list[Member]:
    """Exchanges what the processes are. Returns one `Member` per process, in order."""
    here = Member(
        index=processes.index,
        host=socket.gethostname(),
        pid=os.getpid(),
        workdir=None if workdir is None else str(workdir),
        config=_hash(flatten(config)),
        versions=find_versions(),
    )
    shared = processes.share("members", dataclasses.asdict(here), _INTRODUCE_TIMEOUT_SECONDS)
    return [Member(**fields) for fields in shared]


def find_disagreements(
    processes: Processes, config: Config, members: Sequence[Member]
) -> list[str]:
    """One line per difference that is not allowed: in config keys, versions or our own code."""
    found = []
    if len({member.config for member in members}) > 1:
        configs = processes.share("config", flatten(config), _INTRODUCE_TIMEOUT_SECONDS)
        found.append(f"the processes have different configs: {_name_differences(configs)}")
    versions = [member.versions for member in members]
    if any(other != versions[0] for other in versions):
        found.append(f"the processes run different software: {_name_differences(versions)}")
    return found


def require_agreement(processes: Processes, config: Config, workdir: Path | None) -> list[Member]:
    """Returns one `Member` per process, in order, if the processes agree.

    Raises:
        ConfigError: they do not agree. The line is the same on every process.
    """
    members = introduce(processes, config, workdir)
    found = find_disagreements(processes, config, members)
    if found:
        raise ConfigError(f"{'; '.join(found)}: {ALIKE}")
    return members


def require_same(processes: Processes, name: str, value: str, fix: str) -> None:
    """Checks that all processes have the same value of `name`.

    If one differed, the others would later wait for it forever. There is no timeout, because one
    process may have prepared its value for hours.

    Raises:
        ConfigError: names the processes whose value is not that of process 0, and `fix`. The line
            is the same on every process.
    """
    values = processes.share(name, value)
    others = [index for index, other in enumerate(values) if other != values[0]]
    if others:
        who = ", ".join(map(str, others))
        raise ConfigError(
            f"process {who} has {values[others[0]]}, but process 0 has {values[0]}: {fix}"
        )


def share_devices(processes: Processes) -> list[LocalDevices]:
    """Exchanges the devices of the processes, in order. Touches this process's devices."""
    local = jax.local_devices()
    here = LocalDevices(local[0].platform, local[0].device_kind, len(local))
    shared = processes.share("devices", dataclasses.asdict(here), _DEVICES_TIMEOUT_SECONDS)
    return [LocalDevices(**fields) for fields in shared]


def find_unequal_devices(devices: Sequence[LocalDevices]) -> list[str]:
    """One line that says which processes have which devices, or no line if all have the same."""
    if len(set(devices)) == 1:
        return []
    groups = _group(devices, lambda one: one)
    described = "; ".join(
        f"{one.count} x {one.kind} on {_name(ids)}" for one, ids in groups.items()
    )
    return [f"the processes have unequal devices: {described}"]


def find_versions() -> dict[str, str]:
    """Versions by name: Python, the packages that matter, and a hash of our own sources.

    Optional packages are listed only if they are installed.
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name in _OPTIONAL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **packages, "mixtral_jax": _hash_sources()}


def flatten(config: Config) -> dict[str, Any]:
    """All settings of a config by dotted key, such as `train.num_steps`."""

    def visit(prefix: str, section: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in section.items():
            flat |= (
                visit(f"{prefix}{name}.", value)
                if isinstance(value, dict)
                else {prefix + name: value}
            )
        return flat

    return visit("", dataclasses.asdict(config))


@functools.cache
def _hash_sources() -> str:
    root = Path(__file__).parents[1]
    return _hash(
        {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.py"))}
    )[:_SOURCE_HASH_DIGITS]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _name_differences(tables: Sequence[dict[str, Any]]) -> str:
    """The keys whose values differ, each with its values and the processes that have them."""
    keys = sorted(set().union(*tables))
    differing = [
        key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables)
    ]
    shown = []
    for key in differing[:_MAX_SHOWN_KEYS]:
        groups = _group([table.get(key) for table in tables], repr)
        shown.append(
            f"{key}={', '.join(f'{value} on {_name(ids)}' for value, ids in groups.items())}"
        )
    more = len(differing) - len(shown)
    return ", ".join(shown) + (f" and {more} more keys" if more else "")


def _group(values: Sequence[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[int]]:
    """The indices of the processes that have each value, the most common value first."""
    groups: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(key(value), []).append(index)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _name(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:_MAX_SHOWN_PROCESSES]))
    if len(ids) > _MAX_SHOWN_PROCESSES:
        shown += f", ... ({len(ids)} in all)"
    return f"process{'' if len(ids) == 1 else 'es'} {shown}"
