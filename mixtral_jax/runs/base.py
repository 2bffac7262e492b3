"""The model that a run starts from: opened, and how one is pretrained where none is named."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from mixtral_jax.checkpoint.formats.architecture import require_mixtral
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.runs.text_data import find_tokenizer
from mixtral_jax.runs.run import Run
from mixtral_jax.config import Config, DataConfig, OptimizerConfig, PretrainConfig, RouterConfig, require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Base:
    """A model on disk that a run starts from, and its tokenizer."""

    folder: Path
    weights: Weights
    tokenizer: Tokenizer

    def fit(self, config: Config) -> Config:
        """The config with the shape of this model; how it computes, and what it is trained with,
        stay.
        """
        architecture, asked = self.weights.architecture, config.model
        model = dataclasses.replace(
            architecture.model, dtype=asked.dtype, param_dtype=asked.param_dtype, remat=asked.remat,
            attention=asked.attention,
            context_length=max(architecture.context_length, config.train.sequence_length),
        )
        chosen = architecture.router.num_experts_per_token
        router = dataclasses.replace(config.router, num_experts_per_token=chosen)
        return dataclasses.replace(config, model=model, router=router)

    def loader(self, run: Run) -> Callable[[], Transformer]:
        """A function that reads the weights onto the mesh in force, each device its part, as the
        run keeps them.
        """

        def load() -> Transformer:
            tunable = make_tunable(run.config, run.mesh.devices.flat[0].platform)
            return load_model(self.weights.parameters, jax.eval_shape(tunable.make_base))

        return load


def open_base(folder: Path, config: Config) -> Base:
    """Opens what `--checkpoint` takes, without reading the weights.

    Raises:
        ConfigError: there is no Mixtral, none that could be exported again, or no tokenizer for it.
    """
    weights = open_weights(folder)
    require_mixtral(weights.architecture)
    tokenizer = find_tokenizer(weights.tokenizer, config.data, weights.architecture.model.vocab_size)
    return Base(folder, weights, tokenizer)


def require_folder(base: str, key: str) -> Path:
    """The folder that a config names as `key`; raises ConfigError if there is none."""
    folder = Path(base).expanduser()
    require(folder.is_dir(), f"{key}={folder} is no folder: name a run, a step of it, or other weights")
    return folder


def open_named_base(config: Config) -> Base:
    """Opens what `finetune.base` names; raises ConfigError as `open_base` does."""
    assert config.finetune is not None and config.finetune.base is not None
    return open_base(require_folder(config.finetune.base, "finetune.base"), config)


def saved_steps(run: Run) -> list[int]:
    """The steps of the checkpoints in the workdir of a run, as process 0 sees them.

    All processes must ask.
    """
    folder = run.workdir / "checkpoints"
    return run.processes.share("saved steps", find_steps(folder) if folder.is_dir() else [])[0]


def plan_base(config: Config, plan: PretrainConfig) -> Config:
    """The pretraining of a base, with the model of the config, for a run that names none."""
    return dataclasses.replace(
        config,
        finetune=None,
        upcycle=None,
        router=RouterConfig(num_experts_per_token=config.router.num_experts_per_token),
        data=dataclasses.replace(
            config.data,
            path=plan.path or (DataConfig if config.finetune else config.data).path,
            # Those of conversations are not those of text.
            suffixes=None if config.finetune else config.data.suffixes,
        ),
        optimizer=OptimizerConfig(learning_rate=plan.learning_rate),
        train=dataclasses.replace(
            config.train, num_steps=plan.num_steps, batch_size=plan.batch_size, gradient_accumulation=1
        ),
    )
