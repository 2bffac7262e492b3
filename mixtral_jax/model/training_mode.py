"""Puts a model in training mode, and adds the noise that belongs to training.

A model in training mode holds one key per layer, from which its routers draw all their noise.
Without the key it is deterministic.
"""

from typing import Any

import jax

from mixtral_jax.model.surgery import copy_module, drop_inputs_of, replace_blocks, replace_modules
from mixtral_jax.model.transformer import Block, Transformer


def enter_training(model: Transformer, key: jax.Array) -> Transformer:
    """A copy of the model in training mode, whose noise is drawn from `key`."""
    model = copy_module(model)
    model.blocks.moe.router.training_key = jax.random.split(key, model.config.num_layers)
    return model


def drop_hidden(model: Transformer, rate: float, key: jax.Array) -> Transformer:
    """A copy of the model whose experts lose a share `rate` of their hidden units.

    The other units grow to make up for them. This is expert dropout (Switch Transformer, arXiv
    2101.03961, section 2.4), but with one mask for all tokens of a micro-batch. A mask per token
    would take R x F random numbers per layer, and experts would need to know which token a row is.
    One mask for all tokens is also the same on every mesh and with every transport.
    """

    def drop_in_block(block: Block, key: jax.Array) -> Block:
        def drop(down: Any) -> Any:
            drop_inputs_of(down, rate, key)
            return down

        return replace_modules(block, ["moe.experts.down"], drop)

    keys_L = jax.random.split(key, model.config.num_layers)
    return replace_blocks(model, jax.vmap(drop_in_block)(model.blocks, keys_L))
