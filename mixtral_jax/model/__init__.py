"""The Mixtral decoder: pure functions of parameters and tokens, which know nothing of training.

Arrays end in their dimensions, and einsum strings repeat them:

    B batch   T query length   S key length   D model   V vocabulary
    N query heads   K key/value heads   G = N // K   H head size
    E experts   F expert hidden   A active experts per token   U hidden of the shared experts
    M = B * T tokens on a shard   R routed rows on a shard   L layers
"""
