"""The Mixtral decoder: pure functions of parameters and tokens.

This room knows no loss weights, optimizer, step, adapter or checkpoint. A model in training mode
(`training_mode`) holds a key from which all noise is drawn; without it, a model is deterministic.

Arrays end in their dimensions, and einsum strings repeat them:

    B batch   T query length   S key length   D model   V vocabulary
    N query heads   K key/value heads   G = N // K   H head size
    E experts   F expert hidden   A active experts per token   U hidden of the shared experts
    M = B * T tokens on a shard   R routed rows on a shard   L layers
"""
