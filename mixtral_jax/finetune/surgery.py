"""Operations on whole models: adds adapters to every block, and drops part of their inputs.

Each function returns a new model and does not change its argument.
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


def add_adapters(model: Transformer, config: Config, rngs: nnx.Rngs) -> Transformer:
    """The model with an adapter on each projection that `finetune.lora.targets` names.

    It computes the same as before. Adapters are stored in `model.param_dtype`; the other parameters
    keep their dtypes.

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


def drop_inputs(model: Transformer, rate: float, key: jax.Array) -> Transformer:
    """The model with a share `rate` of each adapter's input features dropped, the rest scaled up.

    Sets random rows of A to zero, drawn separately for each layer, expert and adapter, but the same
    for all tokens (LoRA Dropout, arXiv 2404.09610, without dropping columns of B). A mask per token
    would cost more than the adapters: R x F random numbers per layer, drawn again when the layer is
    recomputed. Experts would also need to know which token a row belongs to. Since it depends on
    neither, the mask is the same on every mesh and with every transport.
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
