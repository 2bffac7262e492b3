"""Makes a router prefer some experts, for tests of uneven routing."""

from typing import Any

import jax.numpy as jnp


def prefer_experts(gate: Any, offsets_E: Any, embedding: Any = None) -> None:
    """Adds nearly the same offsets to the router's logits of every token, in place.

    The first row of the gate becomes `offsets_E`: an input whose first feature is 1 has them added
    to its logits. For a whole model, `embedding` gives every token the first feature 1. The norm
    before the router then scales it, by about 5 for 32 features that are otherwise of size 0.1, and
    so the offsets. All of it may be trained like any other weight.

    Args:
        gate: the variable of the gate's weights, [D, E] or [L, D, E].
        embedding: the variable of the embedding, [V, D]; None for a layer whose inputs have the
            first feature 1 already.
    """
    *layers, D, E = gate.shape
    ones = [1] * len(layers)  # Broadcasting to another rank is an error in tests.
    is_first = (jnp.arange(D) == 0).reshape(*ones, D, 1)
    gate[...] = jnp.where(is_first, jnp.asarray(offsets_E).reshape(*ones, 1, E), gate[...])
    if embedding is not None:
        is_first_1D = (jnp.arange(embedding.shape[-1]) == 0)[None]
        embedding[...] = jnp.where(is_first_1D, 1.0, embedding[...])
