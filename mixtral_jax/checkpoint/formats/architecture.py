"""`Architecture`: what a config file says about a model, and which of our settings it can express.

`huggingface` and `mistral` read it from their files and write it to them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixtral_jax.checkpoint.formats.config_keys import Settings
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
# Not every program's config has these.
_NOT_COMPARED = ("vocab_size", "initializer_range", "dtype", "param_dtype", "context_length")
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
        notes: what of the file is not followed, or was missing, to be printed.
        ties_embeddings: whether the file says that one array is embedding and unembedding.
    """

    model: ModelConfig
    router: RouterConfig
    context_length: int
    notes: tuple[str, ...] = ()
    ties_embeddings: bool = False

    def __post_init__(self):
        self.config()

    def config(self, batch_size: int = 1) -> Config:
        """The config of a run with this model, for loading it; its training settings are defaults.

        Raises:
            ConfigError: two settings contradict each other.
        """
        train = TrainConfig(num_steps=1, batch_size=batch_size, sequence_length=self.context_length)
        return Config(model=self.model, router=self.router, train=train)


def find_differences(one: Architecture, other: Architecture) -> list[str]:
    """The keys with different values in two descriptions of the same weights.

    Vocabularies may differ, since some programs round them up.
    """
    keys = [key for key in _MODEL_KEYS if key not in _NOT_COMPARED]
    values = {f"model.{key}": (getattr(one.model, key), getattr(other.model, key)) for key in keys}
    chosen = (one.router.num_experts_per_token, other.router.num_experts_per_token)
    values["router.num_experts_per_token"] = chosen
    return [f"{key} is {a} and {b}" for key, (a, b) in values.items() if a != b]


def require_numbers(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting is text.

    Our config accepts numbers as text, since the command line passes them so; a file may not.
    """
    texts = [f"{name}={value!r}" for name, value in settings.items() if isinstance(value, str)]
    require(not texts, f"{', '.join(texts)} must be a number, without quotation marks")


def describe_window(settings: Settings, context_length: int) -> tuple[str, ...]:
    """A note on a sliding window that no text of the model's context reaches; none without one.

    Raises:
        ConfigError: the window changes what is computed within the context.
    """
    if "sliding_window" not in settings.values:
        return ()
    key, window = settings.names["sliding_window"], settings.values["sliding_window"]
    require(
        type(window) is int and window >= context_length,
        f"{key}={window!r} is shorter than the context of {context_length} tokens, and attention "
        "in a window is not computed here: set it to null only if the model was trained without it",
    )
    return (
        f"{key}={window} is as long as the context of {context_length} tokens, so it changes "
        "nothing; longer texts are read without it",
    )


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
