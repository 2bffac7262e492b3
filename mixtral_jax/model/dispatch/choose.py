"""Which transport a run takes, and why."""

from collections.abc import Callable

from mixtral_jax.config import Config, require
from mixtral_jax.kernels.choice import Choice
from mixtral_jax.model.dispatch.all_gather import AllGather
from mixtral_jax.model.dispatch.all_to_all import AllToAll
from mixtral_jax.model.dispatch.ragged_all_to_all import RaggedAllToAll
from mixtral_jax.model.dispatch.transport import Transport

TRANSPORTS: dict[str, Callable[[int, float | None], Transport]] = {
    "all_gather": AllGather,
    "all_to_all": AllToAll,
    "ragged_all_to_all": RaggedAllToAll,
}
# XLA:GPU's ragged all-to-all crashes beyond this (openxla/xla issue 47283).
_MAX_RAGGED_GPUS = 32


def choose_transport(config: Config, platform: str) -> Choice:
    """The transport for devices of `platform` (`cpu`, `gpu`, `tpu`) on the mesh of a resolved
    config.

    Raises:
        ConfigError: the one asked for does not work on so many devices of this platform.
    """
    asked, places = config.dispatch.transport, config.mesh.expert or 1
    if places == 1:
        return Choice("all_gather", "with mesh.expert=1 nothing moves")
    too_many = platform == "gpu" and places > _MAX_RAGGED_GPUS
    if asked != "auto":
        require(
            asked != "ragged_all_to_all" or not too_many,
            f"dispatch.transport=ragged_all_to_all crashes over mesh.expert={places} GPUs, more "
            "than "
            f"{_MAX_RAGGED_GPUS}: set all_to_all or all_gather, or a smaller mesh.expert",
        )
        emulated = asked == "ragged_all_to_all" and platform == "cpu"
        return Choice(
            asked,
            "as asked; XLA:CPU lacks the collective, an all-gather stands in"
            if emulated
            else "as asked",
        )
    chosen = config.router.num_experts_per_token
    if places <= chosen:
        return Choice(
            "all_gather",
            f"moves no more than others where mesh.expert={places} is at most top-{chosen}",
        )
    if platform == "cpu":
        return Choice("all_gather", "XLA:CPU has no ragged all-to-all")
    if too_many:
        return Choice(
            "all_gather", f"XLA:GPU's ragged all-to-all crashes over {_MAX_RAGGED_GPUS} devices"
        )
    return Choice(
        "ragged_all_to_all", f"moves {places / chosen:.3g} times fewer rows than all_gather"
    )
