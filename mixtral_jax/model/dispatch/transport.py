"""The interface of transports, which move rows to the experts they chose and home again."""

import dataclasses
from typing import Any, Protocol

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrival:
    """Rows at the device that holds their experts, sorted by expert.

    Rows after those of the last expert may hold anything.
    """

    x_RD: jax.Array
    weight_R1: jax.Array  # the weight of each row's route, float32
    rows_per_expert_E: jax.Array  # for the experts of this device
    overflowed: jax.Array  # number of routes of this device that found no room


class Transport(Protocol):
    """A pair of moves between the devices of an expert group, run inside the region.

    Rows and their gradients travel in their own dtype. Backward passes are the same moves, with
    gathers on each device.
    """

    def out(
        self, x_MD: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array
    ) -> tuple[Arrival, Any]:
        """The rows for this device's experts, and the journey that `home` needs.

        A route whose `chosen_MA` is num_experts goes nowhere.
        """
        ...

    def home(self, y_RD: jax.Array, journey: Any) -> jax.Array:
        """The sum of each token's rows, [M, D], on the device that the token came from."""
        ...
