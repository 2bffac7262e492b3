"""`Architecture`: what a config file says about a model, and which of our settings it can express.

`huggingface` and `mistral` read it from their files and write it to them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mixtral_jax.config import (
    Config,
    ConfigError,
    LoadBalanceConfig,
    ModelConfig,
    RouterConfig,
    TrainConfig,
    require,
)

# transformers' defaults, used if a folder does not say with which losses its router was trained.
UNKNOWN_LOSSES = RouterConfig(
    load_balance=LoadBalanceConfig(weight=0.001, normalization="hf"), z_loss_weight=0.0
)

# Keys that other programs' formats can express, or that do not change what the model computes.
_MODEL_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "rope_theta",
    "norm_eps",
    "initializer_range",
    "dtype",
    "param_dtype",
    "remat",
    "attention",
    "context_length",
)
_ROUTER_KEYS = (
    "num_experts_per_token",
    "load_balance",
    "sequence_loss_weight",
    "z_loss_weight",
    "noise",
    "init_scale",
    "learning_rate_factor",
    "expert_dropout",
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The model, its router with the losses that it was trained with, and its longest sequence.

    Attributes:
        notes: which values were missing in the file and which defaults are used, to be printed.
    """

    model: ModelConfig
    router: RouterConfig
    context_length: int
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        self.config()

    def config(self, batch_size: int = 1) -> Config:
        """The config of a run with this model, for loading it; its training settings are defaults.

        Raises:
            ConfigError: two settings contradict each other.
        """
        train = TrainConfig(num_steps=1, batch_size=batch_size, sequence_length=self.context_length)
        return Config(model=self.model, router=self.router, train=train)


def find_misfits(
    theirs: Mapping[str, Any], needed: Iterable[str], fixed: Mapping[str, Any]
) -> list[str]:
    """Lists what is wrong with the settings in another program's config.

    They must have all keys in `needed`; a key in `fixed` may be missing, but has no other value.
    """
    unsupported = [key for key, value in fixed.items() if theirs.get(key, value) != value]
    wrong = [f"{key} is missing" for key in needed if theirs.get(key) is None]
    return wrong + [f"{key}={theirs[key]!r} must be {fixed[key]!r}" for key in unsupported]


def require_numbers(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting is text.

    Our config accepts numbers as text, since the command line passes them so; a file may not.
    """
    texts = [f"{name}={value!r}" for name, value in settings.items() if isinstance(value, str)]
    require(not texts, f"{', '.join(texts)} must be a number, without quotation marks")


def require_mixtral(architecture: Architecture) -> None:
    """Checks that the formats of Hugging Face and Mistral can express the model.

    Raises:
        ConfigError: they cannot; names each key that is in the way.
    """
    inexpressible = find_inexpressible(architecture.model, architecture.router)
    if inexpressible:
        raise ConfigError(
            "the model can be used here but not exported: a Mixtral of Hugging Face or Mistral "
            f"cannot have {', '.join(inexpressible)}"
        )


def find_inexpressible(model: ModelConfig, router: RouterConfig) -> list[str]:
    """Lists the keys, with their values, that the formats of Hugging Face and Mistral lack."""
    return [
        *_find_inexpressible(model, "model", _MODEL_KEYS),
        *_find_inexpressible(router, "router", _ROUTER_KEYS),
    ]


def _find_inexpressible(config: object, section: str, known: tuple[str, ...]) -> list[str]:
    """The keys outside `known` whose values are not the defaults."""
    assert dataclasses.is_dataclass(config)
    fields = [field for field in dataclasses.fields(config) if field.name not in known]
    values = {field.name: (getattr(config, field.name), _default(field)) for field in fields}
    return [
        f"{section}.{name}={value!r}"
        for name, (value, default) in values.items()
        if value != default
    ]


def _default(field: dataclasses.Field) -> object:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
