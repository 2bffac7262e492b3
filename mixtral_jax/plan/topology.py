"""Turns `--topology` into devices to compile for: a described TPU slice, or virtual CPU devices."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from mixtral_jax.config import ConfigError, require
from mixtral_jax.parallel.mesh import use_virtual_cpu_devices
from mixtral_jax.plan.chips import CHIPS, SLICES, Chip

MAX_GPUS = 4096
_MAX_SHOWN_SLICES = 8
# Slices of about this size are shown if the requested size cannot be read.
_DEFAULT_NUM_CHIPS = 64


@dataclasses.dataclass(frozen=True)
class Topology:
    """The hardware that a step would run on. `shape` is the torus of chips, or [number of GPUs]."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """The number of devices."""
        return math.prod(self.shape) * self.chip.devices_per_chip


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that XLA compiles for. `platform` is theirs: `cpu` for an estimate."""

    topology: Topology
    devices: Sequence[Any]
    platform: str

    @property
    def is_estimate(self) -> bool:
        """True if the program is compiled for other chips than those of the topology.

        Its memory, traffic and collectives may differ from those of a program for the right chips.
        """
        return self.platform == "cpu"


def parse_topology(name: str) -> Topology:
    """Parses a topology such as `v5p:4x4x4` or `h100:8`.

    Raises:
        ConfigError: the chip or the slice does not exist. The message lists those that do.
    """
    chip_name, _, size = name.partition(":")
    chip = CHIPS.get(chip_name)
    tpus = ", ".join(f"{tpu}:{names[-1]}" for tpu, names in SLICES.items())
    known = f"a TPU slice (such as {tpus}) or a number of GPUs (h100:8, h200:64)"
    if chip is None:
        raise ConfigError(f"--topology={name}: unknown chip {chip_name!r}; it must be {known}")
    if chip.kind == "gpu":
        valid = size.isascii() and size.isdigit() and 1 <= int(size) <= MAX_GPUS
        require(
            valid,
            f"--topology={name}: {chip_name} takes a number of GPUs from 1 to {MAX_GPUS}, as "
            f"{chip_name}:8",
        )
        return Topology(name, chip, (int(size),))
    slices = SLICES[chip_name]
    if size not in slices:
        raise ConfigError(
            f"--topology={name}: {chip_name} has no such slice; it has {_nearest(size, slices)}"
        )
    return Topology(name, chip, tuple(map(int, size.split("x"))))


def open_target(topology: Topology, *, cpu_fallback: bool) -> Target:
    """The devices of a topology: described by libtpu for a TPU, virtual CPU devices for GPUs.

    Call it before jax first touches a device. It does not use this machine's own accelerators.

    Args:
        cpu_fallback: use virtual CPU devices for a TPU too, if libtpu is not installed.

    Raises:
        ConfigError: libtpu is not installed, and `cpu_fallback` is false.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.kind == "tpu":
        if importlib.util.find_spec("libtpu"):
            return Target(topology, _describe_slice(topology), "tpu")
        require(
            cpu_fallback,
            f"--topology={topology.name} needs libtpu, which needs no TPU to compile: "
            "pip install -e '.[tpu]' in the clone, or add --cpu_fallback for an estimate on "
            "virtual CPU devices",
        )
    use_virtual_cpu_devices(topology.num_devices, only_compiles=True)
    return Target(topology, jax.devices("cpu"), "cpu")


def _describe_slice(topology: Topology) -> Sequence[Any]:
    """The chips of a slice. Uses no network, and does not lock a TPU of this machine."""
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for variable, value in quiet.items():
        os.environ.setdefault(variable, value)
    # A host has 2x2 chips by default, which a slice of one chip does not have.
    whole = {"chips_per_host_bounds": [1, 1, 1]} if topology.num_devices == 1 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **whole
    ).devices


def _nearest(size: str, slices: Sequence[str]) -> str:
    """All slices if they are few, otherwise those whose number of chips is nearest."""
    if len(slices) <= _MAX_SHOWN_SLICES:
        return ", ".join(slices)
    try:
        wanted = math.prod(map(int, size.split("x")))
    except ValueError:
        wanted = _DEFAULT_NUM_CHIPS
    chips = {name: math.prod(map(int, name.split("x"))) for name in slices}
    nearest = sorted(
        sorted(slices, key=lambda name: abs(chips[name] - wanted))[: _MAX_SHOWN_SLICES - 1],
        key=chips.__getitem__,
    )
    return (
        f"{len(slices)} slices from {slices[0]} to {slices[-1]}; those nearest in number of "
        f"chips are {', '.join(nearest)}"
    )
