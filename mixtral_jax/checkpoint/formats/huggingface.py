"""Reads and writes a Mixtral's config.json, with the keys of transformers 4 and 5.

A family that differs from Mixtral has another `model_type`, and perhaps more keys: add them here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.checkpoint.formats.architecture import (
    UNKNOWN_LOSSES,
    Architecture,
    find_misfits,
    require_numbers,
)
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
# Keys with one possible value: any other value describes a model that is not a Mixtral.
_FIXED_KEYS = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
_DEFAULT_ROPE_THETA = 1e6
_DEFAULT_CONTEXT = 131_072


def read_config(path: Path) -> Architecture:
    """Reads a config.json.

    The returned dtypes are float32, whatever the file says: only the weights tell their dtypes.

    Raises:
        ConfigError: the file describes another kind of model, or contradicts itself; names each
            key.
    """
    theirs = read_object(path)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    wrong = find_misfits(theirs, (*_MODEL_KEYS, "num_experts_per_tok"), _FIXED_KEYS)
    if isinstance(rope, Mapping):
        wrong += find_misfits(rope, (), {"rope_type": "default", "type": "default"})
    else:
        wrong.append(f"rope_parameters={rope!r} must be an object")
    require(
        not wrong,
        f"{path} does not describe a Mixtral that can be loaded: {'; '.join(wrong)}; use the "
        "config.json that belongs to the weights of a Mixtral",
    )
    thetas = {
        "rope_theta": theirs.get("rope_theta"),
        "rope_parameters.rope_theta": rope.get("rope_theta"),
    }
    thetas = {key: theta for key, theta in thetas.items() if theta is not None}
    notes = (
        ()
        if thetas
        else (f"{path} has no rope_theta: uses {_DEFAULT_ROPE_THETA:g}, as transformers does",)
    )
    try:
        require_numbers(thetas)
        described = " and ".join(f"{key}={theta}" for key, theta in thetas.items())
        theta = next(iter(thetas.values()), _DEFAULT_ROPE_THETA)
        require(
            all(other == theta for other in thetas.values()),
            f"{described} contradict each other: remove the wrong one",
        )
        model = _model_config(theirs, theta)
        return Architecture(model, _router_config(theirs), _context_length(theirs), notes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


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


def make_config(architecture: Architecture, dtype: str, bos_id: int, eos_id: int) -> dict[str, Any]:
    """The config.json of a model whose weights are in `dtype`, for transformers 4 and 5."""
    model, router = architecture.model, architecture.router
    balance = router.load_balance
    # At perfect balance transformers' loss is k (experts per token), and that of `switch` is 1.
    unit = 1 if balance.normalization == "hf" else router.num_experts_per_token
    return {
        "architectures": ["MixtralForCausalLM"],
        **{key: value for key, value in _FIXED_KEYS.items() if key != "quantization_config"},
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
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def make_generation_config(bos_id: int, eos_id: int) -> dict[str, Any]:
    """The generation_config.json, which says at which id generation stops."""
    return {"bos_token_id": bos_id, "eos_token_id": eos_id}
