"""A bound on the speed of a step: the times of its arithmetic, memory traffic and communication.

Each of the three runs at its published rate, and all overlap perfectly (the roofline of Williams et
al., 2009, doi 10.1145/1498765.1498785). So the longest time bounds the time of the step, and with
it the model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B). A real step is slower.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from mixtral_jax.plan.chips import Chip
from mixtral_jax.plan.collectives import Collective
from mixtral_jax.plan.topology import Topology

Bound = Literal["compute", "hbm", "interconnect"]


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The three times of a step on one device, and the bounds that follow from the longest."""

    compute_seconds: float
    hbm_seconds: float
    interconnect_seconds: float
    bound_by: Bound
    mfu_bound: float
    tokens_per_second_per_device: float


def make_roofline(
    chip: Chip,
    num_devices: int,
    *,
    model_flops: int,
    hardware_flops: int,
    hbm_bytes: int,
    interconnect_seconds: float,
    tokens: int,
) -> Roofline:
    """Computes the roofline of a step.

    `model_flops`, `hardware_flops` and `tokens` are those of all devices; `hbm_bytes` and
    `interconnect_seconds` are those of one.
    """
    seconds: dict[Bound, float] = {
        "compute": hardware_flops / num_devices / chip.flops_per_second,
        "hbm": hbm_bytes / chip.hbm_bytes_per_second,
        "interconnect": interconnect_seconds,
    }
    bound_by = max(seconds, key=lambda part: seconds[part])
    longest = seconds[bound_by]
    return Roofline(
        compute_seconds=seconds["compute"],
        hbm_seconds=seconds["hbm"],
        interconnect_seconds=seconds["interconnect"],
        bound_by=bound_by,
        mfu_bound=model_flops / num_devices / chip.flops_per_second / longest,
        tokens_per_second_per_device=tokens / num_devices / longest,
    )


def transfer_seconds(collective: Collective, topology: Topology, coordinates: np.ndarray) -> float:
    """Seconds per step for one kind of collective, if its links carry nothing else.

    All groups have the same shape, so the first one is computed.

    Args:
        coordinates: the torus coordinates of the devices in the order of the mesh, [devices,
            dimensions]. For GPUs, their numbers, [devices, 1].
    """
    members, chip = coordinates[collective.groups[0]], topology.chip
    goes_to_all, sent = "all-to-all" in collective.op, collective.bytes_per_device
    if chip.kind == "gpu":
        return _gpu_seconds(sent, chip, members[:, 0], goes_to_all=goes_to_all)
    # The devices of a chip share its links.
    num_members, members = len(members), np.unique(members, axis=0)
    members_per_chip = num_members // len(members)
    if members_per_chip == num_members:
        return sent / chip.on_chip_bytes_per_second
    if goes_to_all:
        sent *= chip.devices_per_chip * (num_members - members_per_chip) / (num_members - 1)
    else:  # If all members get the same data, one copy enters each chip.
        sent *= chip.devices_per_chip / members_per_chip
    links = _links(members, topology)
    hops, links = _hops(members, topology)[links > 0], links[links > 0]
    if goes_to_all:
        # On a shortest path, the number of links that data crosses in a dimension is the distance
        # of the two members in it.
        others = len(members) - 1
        hops_per_link = np.max(np.sum(hops, axis=(1, 2)) / len(members) / others / links)
    else:
        # In other collectives, members pass on data from neighbours, in all dimensions at once.
        apart = np.sum(hops, axis=0)
        nearest = np.min(apart, axis=1, where=apart > 0, initial=sum(topology.shape))
        hops_per_link = np.mean(nearest) / np.sum(links)
    return float(sent * hops_per_link) / chip.link_bytes_per_second


def _links(members: np.ndarray, topology: Topology) -> np.ndarray:
    """The average number of links of a member along each dimension; 0 if the group is flat."""
    links = []
    for dimension, size in enumerate(topology.shape):
        extent = len(np.unique(members[:, dimension]))
        closes = extent == size and _wraps(topology, dimension)
        links.append(2.0 if closes else 2 * (extent - 1) / extent)
    return np.array(links)


def _hops(members: np.ndarray, topology: Topology) -> np.ndarray:
    """The distance of any two members along each dimension, [dimensions, members, members]."""
    apart = np.abs(members[:, None] - members[None]).transpose(2, 0, 1)
    wraps = np.array([_wraps(topology, dimension) for dimension in range(len(topology.shape))])
    around = np.array(topology.shape)[:, None, None] - apart
    return np.where(wraps[:, None, None], np.minimum(apart, around), apart)


def _wraps(topology: Topology, dimension: int) -> bool:
    """True if the last chip of a dimension has a link to the first.

    A slice of v5p has these links if it consists of whole 4x4x4 cubes. A slice of v6e or v5e has
    them in a dimension that is as long as the pod (see the pages in chips.py).
    """
    if len(topology.shape) == 3:
        return min(topology.shape) >= 4
    return topology.shape[dimension] == 16


def _gpu_seconds(sent: int, chip: Chip, members: np.ndarray, *, goes_to_all: bool) -> float:
    """Seconds between GPUs.

    NVLink carries data within a node and, at the same time, the network card carries data to other
    nodes.
    """
    nodes = np.unique(members // chip.node_size)
    others = len(members) - 1
    # If all members get the same data, one copy enters each node, and its members share that work.
    leaving = (others + 1 - math.ceil(len(members) / len(nodes))) if goes_to_all else len(nodes) - 1
    share = leaving / others
    return max(
        sent * (1 - share) / chip.link_bytes_per_second,
        sent * share / chip.network_bytes_per_second,
    )
