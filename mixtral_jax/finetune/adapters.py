"""Builds the model of a tuning from the config: the frozen base, its adapters and their dropout.

Leaves to `checkpoint` where the weights of the base come from, and to `training` how adapters
learn. Each function returns something new and does not change its arguments.
"""

import dataclasses

import jax
from flax import nnx

from mixtral_jax.config import Config
from mixtral_jax.finetune.lora import Adapted, Plain, adapt
from mixtral_jax.finetune.targets import match_targets
from mixtral_jax.model.surgery import (
    drop_inputs_of,
    find_modules,
    replace_blocks,
    replace_modules,
)
from mixtral_jax.model.transformer import Block, Transformer

# Adapters are drawn from random numbers of their own, apart from those of the base.
_ADAPTER_STREAM = 1


def plan_base_model(config: Config) -> Config:
    """The config whose model is the plain base, its frozen weights in `finetune.frozen_dtype`."""
    assert config.finetune is not None
    frozen_dtype = config.finetune.frozen_dtype or config.model.param_dtype
    model = dataclasses.replace(config.model, param_dtype=frozen_dtype)
    return dataclasses.replace(config, model=model)


def add_adapters_to(base: Transformer, config: Config) -> Transformer:
    """The base with an adapter on each projection that `finetune.lora.targets` names.

    It computes the same as before. Adapters are initialised from the run's seed and stored in
    `model.param_dtype`; the other parameters keep their dtypes.

    Raises:
        ConfigError: a pattern of the targets matches no projection.
    """
    assert config.finetune is not None
    lora, factor = config.finetune.lora, config.router.learning_rate_factor
    names = match_targets(lora.targets, list(find_modules(base.blocks, Plain)), factor)
    adapter_config = dataclasses.replace(base.config, param_dtype=config.model.param_dtype)

    def adapt_block(block: Block, rngs: nnx.Rngs) -> Block:
        return replace_modules(block, names, lambda plain: adapt(plain, lora, adapter_config, rngs))

    key = jax.random.fold_in(jax.random.key(config.train.seed), _ADAPTER_STREAM)
    rngs_L = nnx.Rngs(key).split(base.config.num_layers)
    return replace_blocks(base, jax.vmap(adapt_block)(base.blocks, rngs_L))


def drop_adapter_inputs(model: Transformer, config: Config, key: jax.Array) -> Transformer:
    """The model for one micro-batch: a share of each adapter's input features dropped at random.

    Sets a share `finetune.lora.dropout` of the rows of A to zero and scales the others up, drawn
    separately for each layer, expert and adapter, but the same for all tokens (LoRA Dropout,
    arXiv 2404.09610, without dropping columns of B). A mask per token would cost more than the
    adapters: R x F random numbers per layer, drawn again when the layer is recomputed. Experts
    would also need to know which token a row belongs to. One mask for all tokens is also the same
    on every mesh and with every transport.
    """
    assert config.finetune is not None
    lora = config.finetune.lora
    if not (lora.rank and lora.dropout):
        return model
    names = list(find_modules(model.blocks, Adapted))

    def drop_in_block(block: Block, key: jax.Array) -> Block:
        keys = iter(jax.random.split(key, len(names)))

        def drop(adapted: Adapted) -> Adapted:
            drop_inputs_of(adapted.lora_a, lora.dropout, next(keys))
            return adapted

        return replace_modules(block, names, drop)

    keys_L = jax.random.split(key, model.config.num_layers)
    return replace_blocks(model, jax.vmap(drop_in_block)(model.blocks, keys_L))
