"""What must be known of a Mixtral besides its weights, whoever wrote it down, and what others can
write down of it.
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

# Of a model whose folder does not say with which losses its router was trained: transformers'
# defaults.
UNKNOWN_LOSSES = RouterConfig(
    load_balance=LoadBalanceConfig(weight=0.001, normalization="hf"), z_loss_weight=0.0
)

# A Mixtral has these, or they change nothing of what it computes.
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
    """The model, its router with the losses it was trained with, and the longest sequence that it
    is meant for.

    `notes` are for people: what was not written down, and what was taken instead.
    """

    model: ModelConfig
    router: RouterConfig
    context_length: int
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        self.config()

    def config(self, batch_size: int = 1) -> Config:
        """The config of a run that has this model, and nothing to train it on.

        Raises:
            ConfigError: the settings do not go together.
        """
        train = TrainConfig(num_steps=1, batch_size=batch_size, sequence_length=self.context_length)
        return Config(model=self.model, router=self.router, train=train)


def find_misfits(
    theirs: Mapping[str, Any], needed: Iterable[str], fixed: Mapping[str, Any]
) -> list[str]:
    """What is wrong with settings that must have the keys `needed`, and those of `fixed` only so,
    if at all.
    """
    other = [key for key, only in fixed.items() if theirs.get(key, only) != only]
    wrong = [f"{key} is missing" for key in needed if theirs.get(key) is None]
    return wrong + [f"{key}={theirs[key]!r} must be {fixed[key]!r}" for key in other]


def require_numbers(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting is text: the command line may give numbers so, but not a
    file.
    """
    texts = [f"{name}={value!r}" for name, value in settings.items() if isinstance(value, str)]
    require(not texts, f"{', '.join(texts)} must be a number")


def require_mixtral(architecture: Architecture) -> None:
    """Makes sure that the model is one that Mixtral's formats have words for.

    Raises:
        ConfigError: names each key that they have none for.
    """
    strange = [
        *_find_strange(architecture.model, "model", _MODEL_KEYS),
        *_find_strange(architecture.router, "router", _ROUTER_KEYS),
    ]
    if strange:
        raise ConfigError(f"a Mixtral of Hugging Face or Mistral cannot have {', '.join(strange)}")


def _find_strange(config: object, section: str, known: tuple[str, ...]) -> list[str]:
    """The keys beyond `known` that are not as they are by default."""
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
