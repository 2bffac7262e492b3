"""Chooses the kernels and the transport of a run, and what its layers keep, each with its reason.

A choice needs only names, a config, a platform and a number of bytes. What the names stand for is
in `attention` and `grouped_matmul` beside this file, for transports in `model.dispatch.transports`,
and for `remat` in `model.transformer`.
"""

import dataclasses
from typing import Generic, TypeVar

from mixtral_jax.config import (
    AttentionName,
    Config,
    GroupedMatmulName,
    RematName,
    TransportName,
    require,
)
from mixtral_jax.kernels import splash, tokamax
from mixtral_jax.kernels.remat import choose_fitting, kept_bytes

# XLA:GPU's ragged all-to-all crashes over more devices (openxla/xla issue 47283).
MAX_RAGGED_GPUS = 32

Name = TypeVar("Name", bound=str)


@dataclasses.dataclass(frozen=True)
class Choice(Generic[Name]):
    """The name of one implementation out of several, and why it was chosen."""

    name: Name
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementations that a run uses. Nothing is left to `auto`."""

    attention: Choice[AttentionName]
    grouped_matmul: Choice[GroupedMatmulName]
    transport: Choice[TransportName]
    remat: Choice[RematName]


def choose_kernels(config: Config, platform: str, memory_bytes: int | None = None) -> Kernels:
    """Chooses all implementations for a config with a resolved mesh.

    Args:
        platform: that of the devices: `cpu`, `gpu` or `tpu`.
        memory_bytes: of a device; None if it is not known, or if nothing will be trained.

    Raises:
        ConfigError: an implementation that the config asks for does not work here.
    """
    return Kernels(
        attention=choose_attention(config, platform),
        grouped_matmul=choose_grouped_matmul(config, platform),
        transport=choose_transport(config, platform),
        remat=choose_remat(config, memory_bytes),
    )


def choose_attention(config: Config, platform: str) -> Choice[AttentionName]:
    """The attention for devices of `platform`; raises ConfigError as `choose_kernels` does."""
    requested = config.model.attention
    obstacle = splash.find_obstacle(config.model.head_dim, config.train.sequence_length, platform)
    if requested != "auto":
        require(
            requested == "xla" or not obstacle,
            f"model.attention=splash needs {obstacle}; use xla",
        )
        return Choice(requested, "as asked")
    if not obstacle:
        return Choice("splash", "scores are never materialised")
    if platform == "tpu":
        return Choice("xla", f"flash attention here needs {obstacle}")
    return Choice("xla", "works everywhere")


def choose_grouped_matmul(config: Config, platform: str) -> Choice[GroupedMatmulName]:
    """The grouped matmul for devices of `platform`; raises ConfigError as `choose_kernels` does."""
    requested = config.dispatch.grouped_matmul
    obstacle = tokamax.find_obstacle(platform)
    if requested != "auto":
        require(
            requested != "tokamax" or not obstacle,
            f"dispatch.grouped_matmul=tokamax needs {obstacle}; use auto",
        )
        if requested == "ragged_dot" and platform != "tpu":
            return Choice(requested, "as asked; XLA may multiply every row by every expert here")
        return Choice(requested, "as asked")
    if platform == "tpu":
        return Choice("ragged_dot", "XLA:TPU has a grouped kernel for it")
    if platform == "gpu" and not obstacle:
        return Choice("tokamax", "grouped kernels for NVIDIA GPUs")
    why = "no work for rows that are not there"
    return Choice("blocks", f"{why}; tokamax would need {obstacle}" if platform == "gpu" else why)


def choose_transport(config: Config, platform: str) -> Choice[TransportName]:
    """The transport for devices of `platform`; raises ConfigError as `choose_kernels` does.

    What works depends on `mesh.expert`, so the config's mesh must be resolved.
    """
    requested, num_places = config.dispatch.transport, config.mesh.expert or 1
    if num_places == 1:
        return Choice("all_gather", "with mesh.expert=1 nothing moves")
    is_too_large = platform == "gpu" and num_places > MAX_RAGGED_GPUS
    if requested != "auto":
        require(
            requested != "ragged_all_to_all" or not is_too_large,
            f"dispatch.transport=ragged_all_to_all crashes over mesh.expert={num_places} GPUs, "
            f"more than {MAX_RAGGED_GPUS}: set all_to_all or all_gather, or a smaller mesh.expert",
        )
        if requested == "ragged_all_to_all" and platform == "cpu":
            why = "as asked; XLA:CPU lacks the collective, an all-gather stands in"
            return Choice(requested, why)
        return Choice(requested, "as asked")
    num_chosen = config.router.num_experts_per_token
    if num_places <= num_chosen:
        limit = f"mesh.expert={num_places} is at most top-{num_chosen}"
        return Choice("all_gather", f"{limit}, so it moves no more rows than the others")
    if platform == "cpu":
        return Choice("all_gather", "XLA:CPU has no ragged all-to-all")
    if is_too_large:
        why = f"XLA:GPU's ragged all-to-all crashes over more than {MAX_RAGGED_GPUS} devices"
        return Choice("all_gather", why)
    times_fewer = f"{num_places / num_chosen:.3g}"
    return Choice("ragged_all_to_all", f"moves {times_fewer} times fewer rows than all_gather")


def choose_remat(config: Config, memory_bytes: int | None) -> Choice[RematName]:
    """What layers keep for the backward pass on devices of `memory_bytes`, None if not known."""
    requested = config.model.remat
    if requested != "auto":
        return Choice(requested, "as asked")
    if memory_bytes is None:
        return Choice("full", "the memory of a device is not known")
    name, gib = choose_fitting(config, memory_bytes), 2**30
    kept = kept_bytes(config, name)
    return Choice(name, f"keeps up to {kept / gib:,.3g} of {memory_bytes / gib:,.3g} GiB a device")
