"""What a transport is: rows out to the experts they chose, and home again."""

import dataclasses
from typing import Any, Protocol

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrival:
    """Rows at the device that holds their experts, sorted by expert; those past the last expert's
    hold anything.
    """

    x_RD: jax.Array
    weight_R1: jax.Array  # of each row's route, float32
    rows_per_expert_E: jax.Array  # of this device's experts
    overflowed: jax.Array  # routes that this device left behind for lack of room


class Transport(Protocol):
    """A pair of moves between the devices of an expert group, run inside the region.

    Rows and their gradients travel in their own dtype; backward passes are gathers and the same
    moves.
    """

    def out(
        self, x_MD: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array
    ) -> tuple[Arrival, Any]:
        """Rows for this device's experts, and what `home` needs; chosen_MA = num_experts goes
        nowhere.
        """
        ...

    def home(self, y_RD: jax.Array, journey: Any) -> jax.Array:
        """The sum of each token's rows, [M, D], at the device that sent the token."""
        ...
