"""From a config to what a run trains: the same for scripts, plans and benchmarks.

Leaves to `checkpoint` where the weights of the base come from, and to `train` how what is trainable
learns.
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from flax.nnx.filterlib import Filter

from mixtral_jax.config import Config
from mixtral_jax.finetune.surgery import add_adapters, drop_inputs
from mixtral_jax.kernels.choose import choose_kernels
from mixtral_jax.model.training_mode import drop_hidden, enter_training
from mixtral_jax.model.transformer import Transformer, model_maker
from mixtral_jax.parallel.rules import AxisRules

# Random numbers of adapters and noise are apart from those of the base, which has the seed itself.
_ADAPTERS, _NOISE = 1, 2


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A model to be trained. `make_base` gives the plain one, in the dtypes that its weights are
    loaded into.

    `adapt` adds to it what is trained beside it, `trainable` tells that from the rest, and
    `perturb` is the noise of training, for `train.step` to add.
    """

    make_base: Callable[[], Transformer]
    adapt: Callable[[Transformer], Transformer]
    trainable: Filter
    perturb: Callable[[Transformer, jax.Array, jax.Array], Transformer]

    def make_model(self) -> Transformer:
        """The model that is trained, of a fresh base."""
        return self.adapt(self.make_base())


def make_tunable(config: Config, platform: str, rules: AxisRules = AxisRules()) -> Tunable:
    """What the config says, for devices of `platform`; without a section `finetune`, all of a plain
    model.
    """
    finetune, router = config.finetune, config.router
    lora = finetune and finetune.lora
    kernels = choose_kernels(config, platform)

    def perturb(model: Transformer, step: jax.Array, number: jax.Array) -> Transformer:
        keys = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(_key(config, _NOISE), step), number), 3
        )
        model = enter_training(model, keys[0])
        if router.expert_dropout:
            model = drop_hidden(model, router.expert_dropout, keys[1])
        return drop_inputs(model, lora.dropout, keys[2]) if lora and lora.dropout else model

    if finetune is None or finetune.lora.rank == 0:
        freezes_router = router.learning_rate_factor == 0
        trainable = (
            nnx.All(nnx.Param, nnx.Not(nnx.PathContains("router"))) if freezes_router else nnx.Param
        )
        return Tunable(model_maker(config, kernels, rules), lambda base: base, trainable, perturb)
    frozen_dtype = finetune.frozen_dtype or config.model.param_dtype
    of_base = dataclasses.replace(
        config, model=dataclasses.replace(config.model, param_dtype=frozen_dtype)
    )

    def adapt(base: Transformer) -> Transformer:
        return add_adapters(base, config, nnx.Rngs(_key(config, _ADAPTERS)))

    return Tunable(model_maker(of_base, kernels, rules), adapt, nnx.LoRAParam, perturb)


def _key(config: Config, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.train.seed), purpose)
