"""Reads and writes a Mixtral's params.json, for mistral-inference and mistral-finetune."""

import dataclasses
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.checkpoint.formats.architecture import (
    UNKNOWN_LOSSES,
    Architecture,
    describe_window,
    require_numbers,
)
from mixtral_jax.checkpoint.formats.config_keys import Key, Settings
from mixtral_jax.config import ConfigError, ModelConfig, RouterConfig, build, require

# From Mistral's keys to ours.
_MODEL_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
}
_MOE_KEYS = ("num_experts", "num_experts_per_tok")
_KEYS = {
    **dict.fromkeys((*_MODEL_KEYS, "moe", "rope_theta"), Key("read")),
    "sliding_window": Key("read", also=("_sliding_window",)),
    "model_type": Key("one_of", ("transformer",)),
    "lora": Key("one_of", (None,)),
    "quantization": Key("one_of", (None,)),
    "tied_embeddings": Key("one_of", (False,)),
    "use_biases": Key("one_of", (False,)),
    # Settings of Mistral's program and not of the model.
    "max_batch_size": Key("no_effect"),
    "max_seq_len": Key("no_effect"),
}
# The default of mistral-inference. That of mistral-finetune is 10,000, so we always write the key.
_DEFAULT_ROPE_THETA = 1e6
# The context length of Mixtral 8x7B; params.json has no key for it.
_CONTEXT_LENGTH = 32_768


def read_params(path: Path) -> Architecture:
    """Reads a params.json.

    The returned dtypes are float32: only the weights tell their dtypes.

    Raises:
        ConfigError: the file describes another kind of model; names each key.
    """
    settings = Settings.of(read_object(path), _KEYS)
    theirs = settings.values
    moe = theirs.get("moe")
    wrong = [*settings.wrong, *settings.find_missing(_MODEL_KEYS), *settings.find_refused(_KEYS)]
    wrong += [f"{key} is not a key of a Mixtral" for key in theirs if key not in _KEYS]
    if not isinstance(moe, dict) or moe.keys() != set(_MOE_KEYS):
        wrong.append(f"moe={moe!r} must be an object with {' and '.join(_MOE_KEYS)}")
    require(
        not wrong,
        f"{path} does not describe a Mixtral that can be loaded: {'; '.join(wrong)}; use the "
        "params.json that belongs to the weights of a Mixtral",
    )
    assert isinstance(moe, dict)
    ours = {name: theirs[key] for key, name in _MODEL_KEYS.items()}
    theta = theirs.get("rope_theta")
    ours |= {
        "num_experts": moe["num_experts"],
        "rope_theta": _DEFAULT_ROPE_THETA if theta is None else theta,
    }
    notes = ()
    if theta is None:
        default = f"{_DEFAULT_ROPE_THETA:g}"
        notes = (f"{path} has no rope_theta: uses {default}, as mistral-inference does",)
    try:
        notes += describe_window(settings, _CONTEXT_LENGTH)
        require_numbers(ours | moe)
        model = build(ModelConfig, ours | {"dtype": "float32"}, "model.")
        chosen = build(
            RouterConfig, {"num_experts_per_token": moe["num_experts_per_tok"]}, "router."
        )
        router = dataclasses.replace(
            UNKNOWN_LOSSES, num_experts_per_token=chosen.num_experts_per_token
        )
        return Architecture(model, router, _CONTEXT_LENGTH, notes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def make_params(architecture: Architecture) -> dict[str, Any]:
    """The params.json of a model."""
    model, router = architecture.model, architecture.router
    return {
        **{key: getattr(model, name) for key, name in _MODEL_KEYS.items()},
        "rope_theta": model.rope_theta,
        "moe": {
            "num_experts_per_tok": router.num_experts_per_token,
            "num_experts": model.num_experts,
        },
    }
