"""The transports by the names that `dispatch.transport` has for them.

Which of them a run takes, and why, is decided in `kernels.choose`.
"""

from collections.abc import Callable

from mixtral_jax.config import TransportName
from mixtral_jax.model.dispatch.all_gather import AllGather
from mixtral_jax.model.dispatch.all_to_all import AllToAll
from mixtral_jax.model.dispatch.ragged_all_to_all import RaggedAllToAll
from mixtral_jax.model.dispatch.transport import Transport

# (num_experts, buffer_factor) -> a transport
TRANSPORTS: dict[TransportName, Callable[[int, float | None], Transport]] = {
    "all_gather": AllGather,
    "all_to_all": AllToAll,
    "ragged_all_to_all": RaggedAllToAll,
}
