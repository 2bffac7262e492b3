"""Stub replaced on merge."""

import dataclasses
from typing import Any, Generic, TypeVar

from mixtral_jax.config import Config

Name = TypeVar("Name")


@dataclasses.dataclass(frozen=True)
class Choice(Generic[Name]):
    """What was taken, and why."""

    name: Name
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What computes and moves what."""

    attention: Choice[Any]
    grouped_matmul: Choice[Any]
    transport: Choice[Any]


def choose_kernels(config: Config, platform: str) -> Kernels:
    """Resolves all."""
    from mixtral_jax.kernels.attention import choose_attention
    from mixtral_jax.kernels.grouped_matmul import choose_kernel
    from mixtral_jax.model.dispatch.choose import choose_transport

    return Kernels(
        choose_attention(config.model, config.train.sequence_length, platform),
        choose_kernel(config.dispatch, platform),
        choose_transport(config, platform),
    )


def choose_transport(config, platform):
    """Stub."""
    from mixtral_jax.model.dispatch.choose import choose_transport

    return choose_transport(config, platform)
