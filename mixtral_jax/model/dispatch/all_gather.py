"""Transport by all-gather: each device of an expert group gets all tokens and picks its rows."""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax.model.dispatch.rows import RowMap, buffer_rows, copy_rows, sort_routes, sum_rows
from mixtral_jax.model.dispatch.transport import Arrival


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Moves E/k times the rows that are needed each way, but works on every back end.

    The receive buffer of a device holds `buffer_factor` times the rows of balanced routing. The
    rows of its last experts and tokens overflow first.
    """

    num_experts: int
    buffer_factor: float | None

    def out(
        self, x_MD: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array
    ) -> tuple[Arrival, RowMap]:
        """The rows of this device's experts, and the map that `home` needs."""
        (M, A), P = chosen_MA.shape, jax.lax.axis_size("expert")
        num_local = self.num_experts // P
        num_rows = buffer_rows(P * M, A, self.num_experts, P, self.buffer_factor)
        place = jax.lax.axis_index("expert") if P > 1 else 0
        local_MA = _gather(chosen_MA) - num_local * place
        local_MA = jnp.where((local_MA >= 0) & (local_MA < num_local), local_MA, num_local)
        routes = sort_routes(local_MA, num_local, num_rows)
        of_tokens = routes.rows.of_tokens()
        x_RD = copy_rows(_gather(x_MD), of_tokens)
        weight_R1 = copy_rows(_gather(weights_MA).reshape(-1, 1), routes.rows.of_routes())
        return Arrival(x_RD, weight_R1, routes.rows_per_expert_E, routes.overflowed), of_tokens

    def home(self, y_RD: jax.Array, journey: RowMap) -> jax.Array:
        """Sums each token's rows on this device, and then over the group: [M, D]."""
        y_MD = sum_rows(y_RD, journey)
        if jax.lax.axis_size("expert") == 1:
            return y_MD
        return jax.lax.psum_scatter(y_MD, "expert", scatter_dimension=0, tiled=True)


def _gather(x_MX: jax.Array) -> jax.Array:
    return (
        x_MX if jax.lax.axis_size("expert") == 1 else jax.lax.all_gather(x_MX, "expert", tiled=True)
    )
