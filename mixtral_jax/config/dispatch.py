"""How rows travel to their experts: the section `dispatch` of a config."""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How rows travel to their experts, and which kernel multiplies them there.

    `transport`: see the files of model/dispatch; `auto`, the best one here. `capacity_factor=None`
    drops nothing; a number drops a sequence's routes over ceil(capacity_factor * k * n / E) an
    expert: those of lowest weight, or with `drop="position"` the last ones. `eval_capacity_factor`
    is that of a run's own evaluations (None: the same; E / k drops nothing); a model that is loaded
    drops nothing. `buffer_factor=None` gives a device room for all rows it can ever get; a number,
    for that times the rows of a balanced routing: fewer bytes, and rows beyond it are lost and
    counted. `grouped_matmul`: `blocks` (loops over blocks of rows), `ragged_dot` (XLA's),
    `tokamax`, or `auto`, the best one here.
    """

    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    drop: Literal["weight", "position"] = "weight"
    buffer_factor: float | None = None
    grouped_matmul: Literal["auto", "blocks", "ragged_dot", "tokamax"] = "auto"

    def __post_init__(self):
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            require(
                factor is None or factor > 0,
                f"dispatch.{name}={factor} must be positive, or None to drop nothing",
            )
        require(
            self.drop == "weight" or self.capacity_factor or self.eval_capacity_factor,
            f"dispatch.drop={self.drop} says what a capacity drops: set dispatch.capacity_factor",
        )
        require(
            self.buffer_factor is None or self.buffer_factor >= 1,
            f"dispatch.buffer_factor={self.buffer_factor} must be at least 1, since even a "
            "balanced routing fills 1, "
            "or None for room for every row",
        )
