"""Operations on whole models: adapters put into every block, their inputs dropped for a step, or
merged for good.

Each returns another model and leaves the one it is given as it was.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from mixtral_jax.config import Config
from mixtral_jax.finetune.lora import Adapted, Plain, adapt
from mixtral_jax.finetune.targets import match_targets
from mixtral_jax.model.transformer import Block, Transformer


def add_adapters(model: Transformer, config: Config, rngs: nnx.Rngs) -> Transformer:
    """The model with an adapter on each projection that the config's targets name; what it computes
    stays the same.

    Adapters are stored in `model.param_dtype`, the rest as it was.

    Raises:
        ConfigError: a pattern of the targets matches no projection.
    """
    assert config.finetune is not None
    lora, factor = config.finetune.lora, config.router.learning_rate_factor
    names = match_targets(lora.targets, list(find(model.blocks, Plain)), factor)
    of_adapters = dataclasses.replace(model.config, param_dtype=config.model.param_dtype)

    def adapt_block(block: Block, rngs: nnx.Rngs) -> Block:
        return _replace(block, names, lambda base: adapt(base, lora, of_adapters, rngs))

    return _with_blocks(
        model, jax.vmap(adapt_block)(model.blocks, rngs.split(model.config.num_layers))
    )


def merge_adapters(model: Transformer) -> Transformer:
    """The plain model that computes the same: W + scaling * A B in float32, then in the dtype of W.

    One layer at a time, so that no more than one is there in float32. Call it under `jax.jit`.
    """
    names = list(find(model.blocks, Adapted))

    def merge_block(block: Block) -> Block:
        return _replace(block, names, _merge)

    return _with_blocks(model, jax.lax.map(merge_block, model.blocks))


def drop_inputs(model: Transformer, rate: float, key: jax.Array) -> Transformer:
    """The model whose adapters go without a share `rate` of their input features, the others made
    up for it.

    Rows of A that are zero, and drawn anew for each layer, expert and adapter, do that for all
    tokens alike (LoRA Dropout, arXiv 2404.09610, without its columns of B). Masks of their own for
    each token would cost more than the adapters: R x F random numbers a layer, drawn again where it
    is recomputed; and experts would need to know which token a row is. So the mask is the same on
    every mesh, and with every transport.
    """
    names = list(find(model.blocks, Adapted))

    def drop_block(block: Block, key: jax.Array) -> Block:
        keys = iter(jax.random.split(key, len(names)))
        return _replace(block, names, lambda adapted: _drop(adapted, rate, next(keys)))

    keys_L = jax.random.split(key, model.config.num_layers)
    return _with_blocks(model, jax.vmap(drop_block)(model.blocks, keys_L))


def drop_hidden(model: Transformer, rate: float, key: jax.Array) -> Transformer:
    """The model whose experts go without a share `rate` of their hidden units, the others made up
    for it.

    Expert dropout (Switch Transformer, arXiv 2101.03961, section 2.4), for the tokens of a
    micro-batch alike, as `drop_inputs` and for its reasons.
    """

    def drop_block(block: Block, key: jax.Array) -> Block:
        return _replace(block, ["moe.experts.down"], lambda down: _drop_rows(down, rate, key))

    keys_L = jax.random.split(key, model.config.num_layers)
    return _with_blocks(model, jax.vmap(drop_block)(model.blocks, keys_L))


def enter_training(model: Transformer, key: jax.Array) -> Transformer:
    """The model whose routers know that they are in training, and what its noise is drawn from."""
    model = _copy(model)
    model.blocks.moe.router.training_key = jax.random.split(key, model.config.num_layers)
    return model


def find(block: nnx.Module, kinds: Any) -> dict[str, Any]:
    """The modules of these kinds in a block, or in a stack of blocks, by their names, as in
    `moe.experts.gate`.
    """
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(block)
        if isinstance(module, kinds)
    }


def _merge(adapted: Adapted) -> Plain:
    base = _copy(adapted.base)
    base.weight = nnx.Param(adapted.merged_weight().astype(base.weight.dtype))
    return base


def _drop(adapted: Adapted, rate: float, key: jax.Array) -> Adapted:
    adapted = _copy(adapted)
    adapted.lora_a = _drop_rows(adapted.lora_a, rate, key)
    return adapted


def _drop_rows(projection: Any, rate: float, key: jax.Array) -> Any:
    """Without a share of its inputs; an adapted one, without the same for base and adapter."""
    projection = _copy(projection)
    if isinstance(projection, Adapted):
        projection.base = _drop_rows(projection.base, rate, key)
        projection.lora_a = _drop_rows(projection.lora_a, rate, key)
        return projection
    weight = projection.weight[...]
    spec = jax.typeof(weight).sharding.spec
    is_kept = jax.random.bernoulli(
        key, 1 - rate, (*weight.shape[:-1], 1), out_sharding=P(*spec[:-1], None)
    )
    projection.weight[...] = jnp.where(is_kept, weight / (1 - rate), 0)
    return projection


def _replace(block: Block, names: list[str], change: Callable[[Any], Any]) -> Block:
    block = _copy(block)
    for name in names:
        *parents, last = name.split(".")
        parent = functools.reduce(getattr, parents, block)
        setattr(parent, last, change(getattr(parent, last)))
    return block


def _with_blocks(model: Transformer, blocks: Block) -> Transformer:
    model = _copy(model)
    model.blocks = blocks
    return model


def _copy(module: Any) -> Any:
    """Other objects, the same arrays."""
    return jax.tree.map(lambda leaf: leaf, module)
