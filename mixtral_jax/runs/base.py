"""The model that a run starts from: opened, or planned where a run that names none pretrains it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import jax

from mixtral_jax.checkpoint.export import require_exportable
from mixtral_jax.checkpoint.formats.architecture import find_inexpressible, require_mixtral
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.config import (
    ChatConfig,
    Config,
    ConfigError,
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    RouterConfig,
    local_path,
    require,
)
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.runs.console import print_notes
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.text_data import find_tokenizer

# Keys of the model that say how it computes, and not what it is: a base leaves them to the config.
_COMPUTING_KEYS = ("dtype", "param_dtype", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class Base:
    """A model on disk that a run starts from, and its tokenizer."""

    folder: Path
    weights: Weights
    tokenizer: Tokenizer

    def fit(self, config: Config) -> Config:
        """The config with the shape of this model; dtypes, remat and attention stay."""
        architecture, wanted = self.weights.architecture, config.model
        model = dataclasses.replace(
            architecture.model,
            **{key: getattr(wanted, key) for key in _COMPUTING_KEYS},
            context_length=max(architecture.context_length, config.train.sequence_length),
        )
        chosen = architecture.router.num_experts_per_token
        router = dataclasses.replace(config.router, num_experts_per_token=chosen)
        return dataclasses.replace(config, model=model, router=router)

    def find_unused(
        self, keys: Iterable[str], section: Literal["finetune", "upcycle"]
    ) -> list[str]:
        """Those of the keys of a config that change nothing, since this model decides them.

        Args:
            section: the section of the config that names this model.
        """
        computing = {f"model.{key}" for key in _COMPUTING_KEYS}
        own = [f"{section}.pretrain."]
        if section == "finetune":  # An upcycled run must have the sizes that its config says.
            own += ["model.", "router.num_experts_per_token"]
        if self.weights.tokenizer is not None:
            own.append("data.tokenizer")
        return [key for key in keys if key.startswith(tuple(own)) and key not in computing]

    def loader(self, run: Run) -> Callable[[], Transformer]:
        """A function that loads the weights onto the mesh in force, each device its shard."""

        def load() -> Transformer:
            return load_model(self.weights.parameters, jax.eval_shape(run.training.make_base))

        return load


def open_base(folder: Path, config: Config, *, is_shown: bool) -> Base:
    """Opens what `--checkpoint` takes, without reading the weights.

    Args:
        is_shown: whether this process prints the notes on the folder.

    Raises:
        ConfigError: there is no Mixtral, none that could be exported again, or no tokenizer for it.
    """
    weights = open_weights(folder)
    print_notes(weights.notes, is_shown=is_shown)
    require_mixtral(weights.architecture)
    vocab_size = weights.architecture.model.vocab_size
    tokenizer = weights.tokenizer or find_tokenizer(weights.side_files, config.data, vocab_size)
    return Base(folder, weights, tokenizer)


def require_folder(base: str, key: str) -> Path:
    """The folder that a config names as `key`; raises ConfigError if there is none."""
    folder = local_path(base, key)
    require(folder.is_dir(), f"{key}={folder} is no folder: name a run, a step of it, or weights")
    return folder


def open_named_base(config: Config, *, is_shown: bool) -> Base:
    """Opens what `finetune.base` names, as `open_base` does.

    Raises:
        ConfigError: as of `open_base`; or the tuned model could not be exported.
    """
    assert config.finetune is not None and config.finetune.base is not None
    folder = require_folder(config.finetune.base, "finetune.base")
    base = open_base(folder, config, is_shown=is_shown)
    require_tunable(base.fit(config))
    # As the run will have it at its end, but for the numbers.
    weights = dataclasses.replace(base.weights, tokenizer=base.tokenizer)
    require_exportable(weights, "hf")
    return base


def require_tunable(config: Config) -> None:
    """Makes sure, before anything is trained, that the tuned model can be exported.

    Raises:
        ConfigError: it cannot; names each key that is in the way.
    """
    inexpressible = find_inexpressible(config.model, config.router)
    require(
        not inexpressible,
        "tuning exports its model, and a Mixtral of Hugging Face or Mistral cannot have "
        f"{', '.join(inexpressible)}: leave each at its default",
    )


def saved_steps(run: Run) -> list[int]:
    """The steps of the checkpoints in a run's workdir, as process 0 sees them.

    All processes must call this.
    """
    folder = run.workdir / "checkpoints"
    return run.processes.share("saved steps", find_steps(folder) if folder.is_dir() else [])[0]


@contextlib.contextmanager
def naming_pretrain_path(plan: PretrainConfig, section: str) -> Iterator[None]:
    """Wraps the pretraining of a base: an error about its text names the key that the user set."""
    try:
        yield
    except ConfigError as error:
        if plan.path is None:
            raise
        named = str(error).replace("data.path=", f"{section}.pretrain.path=")
        raise ConfigError(named) from error


def plan_base(config: Config, plan: PretrainConfig) -> Config:
    """The config that pretrains a base with the model of `config`, for a run that names none."""
    path = plan.path or (DataConfig if config.finetune else config.data).path
    # The suffixes of files with conversations are not those of files with text.
    suffixes = None if config.finetune else config.data.suffixes
    held_out = config.data.held_out if path == config.data.path else None
    data = dataclasses.replace(
        config.data, path=path, suffixes=suffixes, held_out=held_out, chat=ChatConfig()
    )
    return dataclasses.replace(
        config,
        finetune=None,
        upcycle=None,
        router=RouterConfig(num_experts_per_token=config.router.num_experts_per_token),
        data=data,
        optimizer=OptimizerConfig(learning_rate=plan.learning_rate),
        train=dataclasses.replace(
            config.train,
            num_steps=plan.num_steps,
            batch_size=plan.batch_size,
            gradient_accumulation=1,
        ),
    )
