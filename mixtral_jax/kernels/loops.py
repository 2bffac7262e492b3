"""How often loops run whose length depends on the data, as far as the plan of a run can know."""

from mixtral_jax.kernels.blockwise import count_pairs
from mixtral_jax.kernels.chunks import count_balanced_chunks


def count_expected_trips(loop_name: str) -> int | None:
    """The number of times a loop runs if routing is balanced and each row is one document.

    Args:
        loop_name: the names of the scopes around the loop.

    Returns:
        None if no kernel has given the loop its name.
    """
    chunks = count_balanced_chunks(loop_name)
    return count_pairs(loop_name) if chunks is None else chunks
