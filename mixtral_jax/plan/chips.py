"""Published figures of the chips that `plan` knows, and their TPU slices, with sources.

Links carry data in both directions at once, and data sheets give the sum of both. The figures here
are what one chip sends.
"""

import dataclasses
import itertools
from typing import Literal

GIB = 2**30
# What jax takes of a GPU's memory by default (https://docs.jax.dev/en/latest/gpu_memory_allocation).
_GPU_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The figures of one device, which is a chip, or half of one of `devices_per_chip=2`.

    `link_bytes_per_second` is what one link of a chip sends. A TPU has links to its neighbours
    along each dimension of a torus; `on_chip_bytes_per_second` is what one half of a chip sends to
    the other. The links of a GPU count as one, which reaches every other GPU of its node;
    `network_bytes_per_second` is what it sends to other nodes.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    flops_per_second: float  # bfloat16, dense
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float = 0.0
    node_size: int = 1
    devices_per_chip: int = 1
    on_chip_bytes_per_second: float = 0.0

    @property
    def usable_bytes(self) -> int:
        """The memory of a device that jax takes for itself, as a run finds it."""
        return int(self.hbm_bytes * (_GPU_MEMORY_FRACTION if self.kind == "gpu" else 1))


CHIPS = {
    chip.name: chip
    for chip in (
        # https://docs.cloud.google.com/tpu/docs/v5p-training: 459 TFLOP/s, 95 GiB, 2,765 GB/s; six
        # links with 1,200 GB/s in all, both directions together.
        Chip(
            name="v5p",
            kind="tpu",
            flops_per_second=459e12,
            hbm_bytes=95 * GIB,
            hbm_bytes_per_second=2765e9,
            link_bytes_per_second=100e9,
        ),
        # https://docs.cloud.google.com/tpu/docs/tpu7x: a chip is two devices and has 2,307 TFLOP/s,
        # 192 GiB, 7,380 GB/s, and six links with 1,200 GB/s in all, both directions together. From
        # one device to the other, data go six times as fast as over a link.
        Chip(
            name="tpu7x",
            kind="tpu",
            flops_per_second=2307e12 / 2,
            hbm_bytes=96 * GIB,
            hbm_bytes_per_second=7380e9 / 2,
            link_bytes_per_second=100e9,
            devices_per_chip=2,
            on_chip_bytes_per_second=600e9,
        ),
        # https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,638 GB/s; 800 GB/s over
        # 4 links, both directions together.
        Chip(
            name="v6e",
            kind="tpu",
            flops_per_second=918e12,
            hbm_bytes=32 * 10**9,
            hbm_bytes_per_second=1638e9,
            link_bytes_per_second=100e9,
        ),
        # https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s; 400 GB/s over 4
        # links, both directions together.
        Chip(
            name="v5e",
            kind="tpu",
            flops_per_second=197e12,
            hbm_bytes=16 * 10**9,
            hbm_bytes_per_second=819e9,
            link_bytes_per_second=50e9,
        ),
        # https://www.nvidia.com/en-us/data-center/h100/ (SXM): 1,979 TFLOP/s with sparsity, so half
        # of it dense; 80 GB, 3.35 TB/s; NVLink 900 GB/s, both directions together. A DGX H100 has
        # a network card of 400 Gbit/s for each of its 8 GPUs.
        Chip(
            name="h100",
            kind="gpu",
            flops_per_second=989.5e12,
            hbm_bytes=80 * 10**9,
            hbm_bytes_per_second=3350e9,
            link_bytes_per_second=450e9,
            network_bytes_per_second=50e9,
            node_size=8,
        ),
        # https://www.nvidia.com/en-us/data-center/h200/ (SXM): like the H100, with 141 GB at
        # 4.8 TB/s.
        Chip(
            name="h200",
            kind="gpu",
            flops_per_second=989.5e12,
            hbm_bytes=141 * 10**9,
            hbm_bytes_per_second=4800e9,
            link_bytes_per_second=450e9,
            network_bytes_per_second=50e9,
            node_size=8,
        ),
    )
}

# All slices of https://docs.cloud.google.com/tpu/docs/v6e and .../v5e.
_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# https://docs.cloud.google.com/tpu/docs/v5p-training: parts of a 4x4x4 cube, and joined cubes up
# to 16x16x24.
_CUBES = itertools.combinations_with_replacement(range(4, 25, 4), 3)
_SLICES_V5P = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    *(f"{a}x{b}x{c}" for a, b, c in _CUBES if b <= 16),
)
# https://docs.cloud.google.com/tpu/docs/tpu7x has slices of the same shapes, and larger ones.
SLICES: dict[str, tuple[str, ...]] = {
    "v5p": _SLICES_V5P,
    "tpu7x": _SLICES_V5P,
    "v6e": _SLICES_2D,
    "v5e": _SLICES_2D,
}
