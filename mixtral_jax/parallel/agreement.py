"""What the processes of a run must have in common, compared before the first device is touched, and
after.

A difference found late is a hang: each process compiles and waits for another program. So all tell
all what they are, every one judges the same table, and all stop with the same line.
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

# They meet as they join, so only a stalled host takes long; a back end may take minutes to come up
# on a large pod.
_TELL_SECONDS = 60.0
_DEVICES_SECONDS = 300.0

# Packages whose release changes what is computed, compiled or read.
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
# Where one of these is missing on one host alone, that host chooses another kernel, or the CPU.
_OPTIONAL_PACKAGES = ("tokamax", "libtpu", "jax-cuda12-plugin")
_SHOWN_KEYS = 5

# What to do about a disagreement, and about unequal devices.
ALIKE = "start all with the same command, code and environment"
EQUAL = "give every process the same number of devices of one kind"


@dataclasses.dataclass(frozen=True)
class Member:
    """One process, before it has touched a device."""

    index: int
    host: str
    pid: int
    workdir: str | None
    config: str  # sha256, in hex, of the config as given
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class LocalDevices:
    """The devices of one process."""

    platform: str
    kind: str
    count: int


def introduce(processes: Processes, config: Config, workdir: Path | None) -> list[Member]:
    """Every process, in order; they told each other."""
    here = Member(
        index=processes.index,
        host=socket.gethostname(),
        pid=os.getpid(),
        workdir=None if workdir is None else str(workdir),
        config=_hash(flatten(config)),
        versions=find_versions(),
    )
    return [
        Member(**said)
        for said in processes.share("members", dataclasses.asdict(here), _TELL_SECONDS)
    ]


def find_disagreements(
    processes: Processes, config: Config, members: Sequence[Member]
) -> list[str]:
    """A line for each thing in which the processes differ and must not: config keys, versions, our
    own code.
    """
    found = []
    if len({member.config for member in members}) > 1:
        configs = processes.share("config", flatten(config), _TELL_SECONDS)
        found.append(f"the processes have different configs: {_name_differences(configs)}")
    versions = [member.versions for member in members]
    if any(other != versions[0] for other in versions):
        found.append(f"the processes run different software: {_name_differences(versions)}")
    return found


def require_agreement(processes: Processes, config: Config, workdir: Path | None) -> list[Member]:
    """Every process, in order, if they agree.

    Raises:
        ConfigError: they do not; the same line on every process.
    """
    members = introduce(processes, config, workdir)
    found = find_disagreements(processes, config, members)
    if found:
        raise ConfigError(f"{'; '.join(found)}: {ALIKE}")
    return members


def require_same(processes: Processes, name: str, said: str, fix: str) -> None:
    """Makes sure that all processes say the same of `name`: one that differs would make the others
    wait for ever.

    Raises:
        ConfigError: who says what else than process 0, and `fix`; the same line on every process.
    """
    told = processes.share(name, said)  # What it is of may have taken one of them hours: no limit.
    others = [index for index, there in enumerate(told) if there != told[0]]
    if others:
        who = ", ".join(map(str, others))
        raise ConfigError(
            f"process {who} has {told[others[0]]}, but process 0 has {told[0]}: {fix}"
        )


def share_devices(processes: Processes) -> list[LocalDevices]:
    """The devices of every process, in order. Touches the devices of this one."""
    local = jax.local_devices()
    here = LocalDevices(local[0].platform, local[0].device_kind, len(local))
    return [
        LocalDevices(**said)
        for said in processes.share("devices", dataclasses.asdict(here), _DEVICES_SECONDS)
    ]


def find_unequal_devices(devices: Sequence[LocalDevices]) -> list[str]:
    """At most one line: which processes have other devices than the rest."""
    if len(set(devices)) == 1:
        return []
    groups = _group(devices, lambda one: one)
    described = "; ".join(
        f"{one.count} x {one.kind} on {_name(ids)}" for one, ids in groups.items()
    )
    return [f"the processes have unequal devices: {described}"]


def find_versions() -> dict[str, str]:
    """Python, the packages that matter (optional ones if they are there), and a hash of our own
    sources, by name.
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name in _OPTIONAL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **packages, "mixtral_jax": _hash_sources()}


def flatten(config: Config) -> dict[str, Any]:
    """The settings by dotted key."""

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
    )[:12]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _name_differences(tables: Sequence[dict[str, Any]]) -> str:
    """The keys whose values differ, each with its values and who has them."""
    keys = sorted(set().union(*tables))
    differing = [
        key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables)
    ]
    shown = []
    for key in differing[:_SHOWN_KEYS]:
        groups = _group([table.get(key) for table in tables], repr)
        shown.append(
            f"{key}={', '.join(f'{value} on {_name(ids)}' for value, ids in groups.items())}"
        )
    more = len(differing) - len(shown)
    return ", ".join(shown) + (f" and {more} more keys" if more else "")


def _group(values: Sequence[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[int]]:
    """Which processes have each value, the most common first."""
    groups: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(key(value), []).append(index)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _name(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:4])) + (f", ... ({len(ids)} in all)" if len(ids) > 4 else "")
    return f"process{'' if len(ids) == 1 else 'es'} {shown}"
