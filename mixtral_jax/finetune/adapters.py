"""What a config with adapters changes of a training: the frozen base, its adapters, their dropout.

Leaves to `checkpoint` where the weights of the base come from, and to `train` how adapters learn.
"""

import dataclasses

import jax
from flax import nnx

from mixtral_jax.config import Config
from mixtral_jax.finetune.surgery import add_adapters, drop_inputs
from mixtral_jax.model.transformer import Transformer

# Adapters are drawn from random numbers of their own, apart from those of the base.
_ADAPTER_STREAM = 1


def plan_base_model(config: Config) -> Config:
    """The config whose model is the plain base, its frozen weights in `finetune.frozen_dtype`."""
    assert config.finetune is not None
    frozen_dtype = config.finetune.frozen_dtype or config.model.param_dtype
    model = dataclasses.replace(config.model, param_dtype=frozen_dtype)
    return dataclasses.replace(config, model=model)


def add_adapters_to(base: Transformer, config: Config) -> Transformer:
    """The base with the adapters that the config names, initialised from the run's seed."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), _ADAPTER_STREAM)
    return add_adapters(base, config, nnx.Rngs(key))


def drop_adapter_inputs(model: Transformer, config: Config, key: jax.Array) -> Transformer:
    """The model for one micro-batch, its adapters without a random share of their inputs."""
    assert config.finetune is not None
    lora = config.finetune.lora
    return drop_inputs(model, lora.dropout, key) if lora.rank and lora.dropout else model
