"""Copies a model with some of its parts replaced, for adapters and dropout.

A copy shares its arrays with the model, and the model stays as it was.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from mixtral_jax.model.transformer import Block, Transformer


def copy_module(module: Any) -> Any:
    """Copies a module with all its parts; the arrays are the same."""
    return jax.tree.map(lambda leaf: leaf, module)


def find_modules(block: nnx.Module, kinds: Any) -> dict[str, Any]:
    """The modules of these kinds in a block or a stack of blocks, by names such as `moe.router`."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(block)
        if isinstance(module, kinds)
    }


def replace_modules(block: Block, names: Sequence[str], change: Callable[[Any], Any]) -> Block:
    """A copy of `block` in which `change(module)` replaces each of the modules with these names.

    `change` is called with modules of the copy, in the order of the names, and may modify them.
    """
    block = copy_module(block)
    for name in names:
        *parents, last = name.split(".")
        parent = functools.reduce(getattr, parents, block)
        setattr(parent, last, change(getattr(parent, last)))
    return block


def replace_blocks(model: Transformer, blocks: Block) -> Transformer:
    """A copy of `model` with another stack of blocks."""
    model = copy_module(model)
    model.blocks = blocks
    return model


def drop_inputs_of(projection: Any, rate: float, key: jax.Array) -> None:
    """Drops a share `rate` of a projection's inputs in place, for all its rows alike.

    Rows of its input weights become zero, and the other rows grow to make up for them. All its
    input weights lose the same rows. Each expert loses rows of its own.
    """
    for variable in projection.input_weights():
        weight = variable[...]
        spec = jax.typeof(weight).sharding.spec
        is_kept = jax.random.bernoulli(
            key, 1 - rate, (*weight.shape[:-1], 1), out_sharding=P(*spec[:-1], None)
        )
        variable[...] = jnp.where(is_kept, weight / (1 - rate), 0)
