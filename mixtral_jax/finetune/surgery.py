"""Operations on whole models: adapters added to every block, dropped inputs, and adapters merged.

Each returns another model and leaves the one it is given as it was.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from mixtral_jax.config import Config
from mixtral_jax.finetune.lora import Adapted, Plain, adapt
from mixtral_jax.finetune.targets import match_targets
from mixtral_jax.model.surgery import (
    copy_module,
    drop_inputs_of,
    find_modules,
    replace_blocks,
    replace_modules,
)
from mixtral_jax.model.transformer import Block, Transformer


def add_adapters(model: Transformer, config: Config, rngs: nnx.Rngs) -> Transformer:
    """The model with an adapter on each projection that the config's targets name.

    What it computes stays the same. Adapters are stored in `model.param_dtype`, the rest as it was.

    Raises:
        ConfigError: a pattern of the targets matches no projection.
    """
    assert config.finetune is not None
    lora, factor = config.finetune.lora, config.router.learning_rate_factor
    names = match_targets(lora.targets, list(find_modules(model.blocks, Plain)), factor)
    adapter_config = dataclasses.replace(model.config, param_dtype=config.model.param_dtype)

    def adapt_block(block: Block, rngs: nnx.Rngs) -> Block:
        return replace_modules(block, names, lambda base: adapt(base, lora, adapter_config, rngs))

    rngs_L = rngs.split(model.config.num_layers)
    return replace_blocks(model, jax.vmap(adapt_block)(model.blocks, rngs_L))


def merge_adapters(model: Transformer) -> Transformer:
    """The plain model that computes the same: W + scaling * A B in float32, then in the dtype of W.

    One layer at a time, so that no more than one is there in float32. Call it under `jax.jit`.
    """
    names = list(find_modules(model.blocks, Adapted))

    def merge_block(block: Block) -> Block:
        return replace_modules(block, names, _merge)

    return replace_blocks(model, jax.lax.map(merge_block, model.blocks))


def drop_inputs(model: Transformer, rate: float, key: jax.Array) -> Transformer:
    """The model whose adapters lose a share `rate` of their input features.

    The other features grow to make up for them. Rows of A become zero for all tokens alike, drawn
    anew for each layer, expert and adapter (LoRA Dropout, arXiv 2404.09610, without its columns of
    B). A mask per token would cost more than the adapters: R x F random numbers per layer, drawn
    again where the layer is recomputed. Experts would also need to know which token a row is. So
    the mask is the same on every mesh and with every transport.
    """
    names = list(find_modules(model.blocks, Adapted))

    def drop_in_block(block: Block, key: jax.Array) -> Block:
        keys = iter(jax.random.split(key, len(names)))

        def drop(adapted: Adapted) -> Adapted:
            drop_inputs_of(adapted.lora_a, rate, next(keys))
            return adapted

        return replace_modules(block, names, drop)

    keys_L = jax.random.split(key, model.config.num_layers)
    return replace_blocks(model, jax.vmap(drop_in_block)(model.blocks, keys_L))


def _merge(adapted: Adapted) -> Plain:
    base: Any = copy_module(adapted.base)
    base.weight = nnx.Param(adapted.merged_weight().astype(base.weight.dtype))
    return base
