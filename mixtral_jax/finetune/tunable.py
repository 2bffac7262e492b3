"""From a config to what a run trains: the same for scripts, plans and benchmarks.

Leaves to `checkpoint` where the weights of the base come from, and to `train` how what is trainable learns.
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from flax.nnx.filterlib import Filter

from mixtral_jax.config import Config
from mixtral_jax.finetune.surgery import add_adapters, drop_inputs
from mixtral_jax.model.transformer import Transformer, model_maker
from mixtral_jax.parallel.rules import AxisRules

# Random numbers of adapters are apart from those of the base, which has the seed itself.
_ADAPTERS, _DROPOUT = 1, 2


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A model to be trained. `make_base` gives the plain one, in the dtypes that its weights are loaded into.

    `adapt` adds to it what is trained beside it, `trainable` tells that from the rest, and `perturb` is noise
    for `train.step` to add.
    """

    make_base: Callable[[], Transformer]
    adapt: Callable[[Transformer], Transformer]
    trainable: Filter
    perturb: Callable[[Transformer, jax.Array, jax.Array], Transformer] | None

    def make_model(self) -> Transformer:
        """The model that is trained, of a fresh base."""
        return self.adapt(self.make_base())


def make_tunable(config: Config, platform: str, rules: AxisRules = AxisRules()) -> Tunable:
    """What the config says, for devices of `platform`; without a section `finetune`, all of a plain model."""
    finetune = config.finetune
    if finetune is None or finetune.lora.rank == 0:
        freezes_router = finetune is not None and finetune.router_learning_rate_factor == 0
        trainable = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("router"))) if freezes_router else nnx.Param
        return Tunable(model_maker(config, platform, rules), lambda base: base, trainable, None)
    frozen_dtype = finetune.frozen_dtype or config.model.param_dtype
    of_base = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype=frozen_dtype))

    def adapt(base: Transformer) -> Transformer:
        return add_adapters(base, finetune, config.model.param_dtype, nnx.Rngs(_key(config, _ADAPTERS)))

    def perturb(model: Transformer, step: jax.Array, number: jax.Array) -> Transformer:
        key = jax.random.fold_in(jax.random.fold_in(_key(config, _DROPOUT), step), number)
        return drop_inputs(model, finetune.lora.dropout, key)

    has_dropout = finetune.lora.dropout > 0
    return Tunable(model_maker(of_base, platform, rules), adapt, nnx.LoRAParam, perturb if has_dropout else None)


def _key(config: Config, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.train.seed), purpose)
