"""One way to assemble training: all that a config and a platform decide about how a model learns.

Runs, plans, benchmarks and the doctor take it from here. Leaves to `runs` where data and initial
weights come from, and to `loop` how often a step is logged, evaluated and saved.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax
from flax import nnx
from flax.nnx.filterlib import Filter

from mixtral_jax.config import Config
from mixtral_jax.finetune.adapters import add_adapters_to, drop_adapter_inputs, plan_base_model
from mixtral_jax.kernels.choose import Kernels, choose_kernels
from mixtral_jax.model.training_mode import drop_hidden, enter_training
from mixtral_jax.model.transformer import Transformer, model_maker
from mixtral_jax.training.loss import Loss, next_token_loss
from mixtral_jax.training.optimizer import (
    bias_rate_schedule,
    learning_rate_schedule,
    make_optimizer,
)
from mixtral_jax.training.state import TrainState, abstract_state, init_state
from mixtral_jax.training.step import Perturb, TrainStep, make_train_step

# The seed of a run draws the weights of its model; noise has random numbers of its own.
_NOISE_STREAM = 2


@dataclasses.dataclass(frozen=True)
class Training:
    """How the model of a config is made and trained on devices of one platform.

    Attributes:
        config: of the run, its mesh resolved.
        kernels: what the model computes and communicates with.
        make_base: initialises the plain model, in the dtypes that its weights are loaded into.
        adapt: adds to a plain model what is trained beside it: adapters, or nothing.
        trainable: filter of the variables that have a gradient; the others are frozen.
        perturb: puts the model in training mode for one micro-batch, with its noise.
        optimizer: changes the trained variables.
        schedule: learning rate of each step, for the metrics.
        loss: of the task, to which the losses of the router are added.
    """

    config: Config
    kernels: Kernels
    make_base: Callable[[], Transformer]
    adapt: Callable[[Transformer], Transformer]
    trainable: Filter
    perturb: Perturb
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss: Loss

    def make_model(self) -> Transformer:
        """Initialises the model that is trained: the plain one, adapted."""
        return self.adapt(self.make_base())

    def init(self, base: Transformer | None = None) -> TrainState:
        """The state before the first step, sharded over the mesh in force.

        Args:
            base: a plain model to start from, whose memory the state takes over; None starts from
                random weights.
        """
        if base is None:
            return init_state(self.make_model, self.optimizer, self.trainable)
        return init_state(self.adapt, self.optimizer, self.trainable, base)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of `init`, without allocating: what a restore fills."""
        return abstract_state(self.make_model, self.optimizer, self.trainable)

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """The jitted step, from a state and a batch to the next state and metrics."""
        router = self.config.router
        return make_train_step(
            self.optimizer,
            router,
            self.schedule,
            self.perturb,
            bias_rate=bias_rate_schedule(router.bias, self.config.train.num_steps),
            loss=self.loss,
        )


def make_training(
    config: Config,
    platform: str,
    memory_bytes: int | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None,
) -> Training:
    """Assembles training as the config says, for devices of `platform` (`cpu`, `gpu`, `tpu`).

    Args:
        config: its mesh resolved.
        memory_bytes: of a device, by which `model.remat=auto` is decided; None if not known.
        optimizer: in place of the config's; `learning_rate` in the metrics is then that of the
            config all the same.
        loss: of the task; by default that of the next token.

    Raises:
        ConfigError: a kernel or a transport that the config asks for does not work there.
    """
    kernels = choose_kernels(config, platform, memory_bytes)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    if optimizer is None:
        factor = config.router.learning_rate_factor
        optimizer = make_optimizer(config.optimizer, schedule, factor)
    has_adapters = config.finetune is not None and config.finetune.lora.rank > 0
    base = plan_base_model(config) if has_adapters else config
    return Training(
        config=config,
        kernels=kernels,
        make_base=model_maker(base, kernels),
        adapt=functools.partial(add_adapters_to, config=config) if has_adapters else _keep,
        trainable=nnx.LoRAParam if has_adapters else _choose_trainable(config),
        perturb=functools.partial(_perturb, config),
        optimizer=optimizer,
        schedule=schedule,
        loss=loss or next_token_loss,
    )


def _keep(base: Transformer) -> Transformer:
    return base


def _choose_trainable(config: Config) -> Filter:
    if config.router.learning_rate_factor == 0:
        return nnx.All(nnx.Param, nnx.Not(nnx.PathContains("router")))
    return nnx.Param


def _perturb(
    config: Config, model: Transformer, step: jax.Array, micro_batch: jax.Array
) -> Transformer:
    key = jax.random.fold_in(jax.random.key(config.train.seed), _NOISE_STREAM)
    key = jax.random.fold_in(jax.random.fold_in(key, step), micro_batch)
    router_key, expert_key, adapter_key = jax.random.split(key, 3)
    model = enter_training(model, router_key)
    if config.router.expert_dropout:
        model = drop_hidden(model, config.router.expert_dropout, expert_key)
    return drop_adapter_inputs(model, config, adapter_key) if config.finetune else model
