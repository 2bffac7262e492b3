"""Reads and writes a Mixtral's config.json, with the keys of transformers 4 and 5.

`config_keys` has what happens to each key. A family that differs from Mixtral has another
`model_type`, and perhaps more keys: add them there and here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.checkpoint.formats.architecture import (
    UNKNOWN_LOSSES,
    Architecture,
    describe_window,
    require_numbers,
)
from mixtral_jax.checkpoint.formats.config_keys import KEYS, ROPE_KEYS, Settings
from mixtral_jax.config import ConfigError, ModelConfig, RouterConfig, build, require

# From transformers' keys to ours.
_MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_local_experts": "num_experts",
}
# Keys that may be missing, with our key and the default of transformers.
_OPTIONAL_KEYS = {
    "rms_norm_eps": ("norm_eps", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
}
# Objects that may have the base of rotary positions too, and how positions are scaled.
_ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
_DEFAULT_ROPE_THETA = 1e6
_DEFAULT_CONTEXT = 131_072


def read_config(path: Path) -> Architecture:
    """Reads a config.json.

    The returned dtypes are float32, whatever the file says: only the weights tell their dtypes.

    Raises:
        ConfigError: the file describes another kind of model, or contradicts itself; names each
            key.
    """
    settings = Settings.of(read_object(path), KEYS)
    theirs = settings.values
    wrong = [*settings.wrong, *settings.find_missing((*_MODEL_KEYS, "num_experts_per_tok"))]
    wrong += [*settings.find_refused(KEYS), *_find_wrong_positions(theirs)]
    if not isinstance(theirs.get("tie_word_embeddings", False), bool):
        wrong.append(f"tie_word_embeddings={theirs['tie_word_embeddings']!r} must be true or false")
    require(
        not wrong,
        f"{path} does not describe a Mixtral that can be loaded: {'; '.join(wrong)}; use the "
        "config.json that belongs to the weights of a Mixtral",
    )
    unknown = settings.find_unknown(KEYS)
    notes = (f"config.json: not read: {', '.join(unknown)}",) if unknown else ()
    thetas = _find_thetas(theirs)
    if not thetas:
        notes += (f"{path} has no rope_theta: uses {_DEFAULT_ROPE_THETA:g}, as transformers does",)
    try:
        require_numbers(thetas)
        described = " and ".join(f"{key}={theta}" for key, theta in thetas.items())
        theta = next(iter(thetas.values()), _DEFAULT_ROPE_THETA)
        require(
            all(other == theta for other in thetas.values()),
            f"{described} contradict each other: remove the wrong one",
        )
        context_length = _context_length(theirs)
        notes += describe_window(settings, context_length)
        return Architecture(
            _model_config(theirs, theta),
            _router_config(theirs),
            context_length,
            notes,
            ties_embeddings=theirs.get("tie_word_embeddings", False),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _find_wrong_positions(theirs: Mapping[str, Any]) -> Iterator[str]:
    """What the two objects about rotary positions say that cannot be computed."""
    for key in _ROPE_OBJECTS:
        rope = theirs.get(key, {})
        if not isinstance(rope, Mapping):
            yield f"{key}={rope!r} must be an object"
            continue
        settings = Settings.of(rope, ROPE_KEYS)
        found = [*settings.wrong, *settings.find_refused(ROPE_KEYS)]
        found += [f"{each} is not computed here" for each in settings.find_unknown(ROPE_KEYS)]
        yield from (f"{key}.{each}" for each in found)


def _find_thetas(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The base of rotary positions, by each key that gives it."""
    places = {"rope_theta": theirs.get("rope_theta")}
    places |= {f"{key}.rope_theta": theirs.get(key, {}).get("rope_theta") for key in _ROPE_OBJECTS}
    return {key: theta for key, theta in places.items() if theta is not None}


def _model_config(theirs: Mapping[str, Any], rope_theta: Any) -> ModelConfig:
    ours = {name: theirs[key] for key, name in _MODEL_KEYS.items()}
    ours |= {name: theirs.get(key, default) for key, (name, default) in _OPTIONAL_KEYS.items()}
    ours["rope_theta"] = rope_theta
    ours["head_dim"] = theirs.get("head_dim")
    require_numbers(ours)
    if (
        ours["head_dim"] is None
        and isinstance(ours["hidden_size"], int)
        and isinstance(ours["num_heads"], int)
    ):
        ours["head_dim"] = ours["hidden_size"] // max(ours["num_heads"], 1)
    return build(ModelConfig, ours | {"dtype": "float32"}, "model.")


def _router_config(theirs: Mapping[str, Any]) -> RouterConfig:
    # transformers adds the balance loss only if output_router_logits is set; the coefficient is
    # what the model's authors intended, so it is used whether that is set or not.
    balance = {
        "weight": theirs.get("router_aux_loss_coef", UNKNOWN_LOSSES.load_balance.weight),
        "normalization": "hf",
    }
    ours = {
        "num_experts_per_token": theirs["num_experts_per_tok"],
        "load_balance": balance,
        "z_loss_weight": 0.0,
    }
    return build(RouterConfig, ours, "router.")


def _context_length(theirs: Mapping[str, Any]) -> int:
    length = theirs.get("max_position_embeddings", _DEFAULT_CONTEXT)
    require(
        type(length) is int and length >= 2,
        f"max_position_embeddings={length!r} must be a whole number of at least 2",
    )
    return length


def make_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose weights are in `dtype`, for transformers 4 and 5.

    Without the ids of special tokens, which `checkpoint.export` adds.
    """
    model, router = architecture.model, architecture.router
    balance = router.load_balance
    # At perfect balance transformers' loss is k (experts per token), and that of `switch` is 1.
    unit = 1 if balance.normalization == "hf" else router.num_experts_per_token
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        **{key: getattr(model, name) for key, name in _MODEL_KEYS.items()},
        **{key: getattr(model, name) for key, (name, _) in _OPTIONAL_KEYS.items()},
        "head_dim": model.head_dim,
        "num_experts_per_tok": router.num_experts_per_token,
        "max_position_embeddings": architecture.context_length,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "router_aux_loss_coef": balance.weight / unit,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
