"""How rows travel to their experts: the section `dispatch` of a config."""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require

# Each name is a transport of model/dispatch/transports.py.
TransportName = Literal["all_gather", "all_to_all", "ragged_all_to_all"]
# Each name is a kernel of kernels/grouped_matmul.py.
GroupedMatmulName = Literal["blocks", "ragged_dot", "tokamax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How rows travel to their experts, and which kernel multiplies them there.

    Attributes:
        transport: how rows move between devices; `auto` is the best transport for these devices.
            See the files of model/dispatch.
        capacity_factor: an expert takes at most ceil(capacity_factor * k * n / E) routes from a
            sequence of n real tokens, and the rest are dropped. None drops nothing.
        eval_capacity_factor: the capacity factor of a run's own evaluations. None takes
            `capacity_factor`; E / k drops nothing. A model that is loaded drops nothing.
        drop: which routes over capacity are dropped: those of lowest `weight`, or the last by
            `position`.
        buffer_factor: size of the receive buffer as a multiple of the rows under balanced routing.
            None allocates the worst case and loses nothing; otherwise rows that overflow are
            dropped and counted.
        grouped_matmul: the kernel of the experts: `blocks` (loops over blocks of rows),
            `ragged_dot` (XLA's), `tokamax`, or `auto`, the best kernel for these devices.
    """

    transport: Literal["auto", TransportName] = "auto"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    drop: Literal["weight", "position"] = "weight"
    buffer_factor: float | None = None
    grouped_matmul: Literal["auto", GroupedMatmulName] = "auto"

    def __post_init__(self):
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            require(
                factor is None or factor > 0,
                f"dispatch.{name}={factor} must be positive, or None to drop nothing",
            )
        require(
            self.drop == "weight" or self.capacity_factor or self.eval_capacity_factor,
            f"dispatch.drop={self.drop} chooses which routes over capacity are dropped: set "
            "dispatch.capacity_factor",
        )
        require(
            self.buffer_factor is None or self.buffer_factor >= 1,
            f"dispatch.buffer_factor={self.buffer_factor} must be at least 1, since even balanced "
            "routing fills a buffer of factor 1; None makes room for every row",
        )
