"""What happens to each key of another program's config; `KEYS` has those of a config.json.

`huggingface` reads the values. A key is in `KEYS` because Mixtral has it, because any model of
transformers has it, or because a relative of Mixtral computes something else with it. `mistral` has
the few keys of a params.json.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

# `read`: its value decides what is computed, or is kept for an export.
# `one_of`: it changes what a model computes, and only some values are computed here; others are
#     refused by name.
# `kept`: it is of no effect here, and an export has it again.
# `no_effect`: it says nothing of what is computed here.
Fate = Literal["read", "one_of", "kept", "no_effect"]


@dataclasses.dataclass(frozen=True)
class Key:
    """What happens to a key.

    Attributes:
        values: those that are as good as none; empty if all are. Of `one_of`, others are refused,
            and the error names the first of these; of `no_effect`, others are told. Of `kept`,
            an export has these anyway.
        also: other names of the same thing, which are read too.
    """

    fate: Fate
    values: tuple[Any, ...] = ()
    also: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether a value is as good as none; a list of strings, if each of them is."""
        if value and isinstance(value, list) and all(isinstance(each, str) for each in value):
            return all(map(self.allows, value))
        return not self.values or value in self.values


_READ, _NO_EFFECT = Key("read"), Key("no_effect")


def _one_of(*values: Any, also: tuple[str, ...] = ()) -> Key:
    return Key("one_of", values, also)


_OF_MIXTRAL = {
    "model_type": _one_of("mixtral"),
    "vocab_size": _READ,
    "hidden_size": _READ,
    "intermediate_size": _READ,
    "num_hidden_layers": _READ,
    "num_attention_heads": _READ,
    "num_key_value_heads": Key("read", also=("num_kv_heads",)),
    "head_dim": _READ,
    "num_local_experts": Key("read", also=("num_experts", "n_routed_experts", "moe_num_experts")),
    "num_experts_per_tok": Key(
        "read", also=("num_experts_per_token", "moe_top_k", "moe_topk", "num_selected_experts")
    ),
    "hidden_act": _one_of("silu", "swish", also=("hidden_activation", "activation_function")),
    "rms_norm_eps": Key("read", also=("layer_norm_eps", "layer_norm_epsilon", "norm_eps")),
    "initializer_range": _READ,
    "max_position_embeddings": _READ,
    "sliding_window": _READ,
    "rope_theta": _READ,
    "rope_parameters": _READ,
    "rope_scaling": _READ,
    "tie_word_embeddings": _READ,
    "router_aux_loss_coef": _READ,
    "router_jitter_noise": _one_of(0.0),
    "bos_token_id": _READ,
    "eos_token_id": _READ,
    "pad_token_id": _READ,
    # Only the weights say in which dtype they are.
    "torch_dtype": Key("no_effect", also=("dtype",)),
    "attention_dropout": Key("no_effect", (0.0,)),
    "output_router_logits": _NO_EFFECT,
}
_OF_ANY_MODEL = dict.fromkeys(
    (
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "architectures",
        "chunk_size_feed_forward",
        "id2label",
        "is_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torchscript",
        "transformers_version",
        "use_cache",
    ),
    _NO_EFFECT,
) | {
    "quantization_config": _one_of(None),
    "compression_config": _one_of(None),
    "auto_map": _one_of(None),
    "is_encoder_decoder": _one_of(False),
    "add_cross_attention": _one_of(False),
    "pruned_heads": _one_of({}),
}
# What relatives of Mixtral compute, which is not computed here.
_OF_RELATIVES = {
    "attention_bias": _one_of(False),
    "qkv_bias": _one_of(False),
    "mlp_bias": _one_of(False),
    "use_bias": _one_of(False),
    "use_qk_norm": _one_of(False, also=("qk_norm",)),
    "clip_qkv": _one_of(None),
    "use_sliding_window": _one_of(False),
    "attention_chunk_size": _one_of(None),
    "attn_logit_softcapping": _one_of(None),
    "final_logit_softcapping": _one_of(None),
    "query_pre_attn_scalar": _one_of(None),
    "attention_multiplier": _one_of(None),
    "layer_types": _one_of("full_attention"),
    "partial_rotary_factor": _one_of(1.0, also=("rotary_pct",)),
    "position_embedding_type": _one_of("rope"),
    "rope_interleave": _one_of(False),
    "embedding_multiplier": _one_of(1.0),
    "residual_multiplier": _one_of(1.0),
    "logits_scaling": _one_of(1.0),
    "logit_scale": _one_of(1.0),
    "norm_topk_prob": _one_of(True),
    "scoring_func": _one_of("softmax", also=("score_function", "moe_router_score_function")),
    "routed_scaling_factor": _one_of(1.0),
    "n_group": _one_of(1),
    "n_shared_experts": _one_of(0, also=("num_shared_experts",)),
    "shared_expert_intermediate_size": _one_of(0),
    "first_k_dense_replace": _one_of(0),
    "mlp_only_layers": _one_of([]),
    "decoder_sparse_step": _one_of(1),
    "moe_layer_freq": _one_of(1),
    "num_nextn_predict_layers": _one_of(0),
}
KEYS: Mapping[str, Key] = _OF_MIXTRAL | _OF_ANY_MODEL | _OF_RELATIVES

# The keys in rope_parameters and rope_scaling. Any other changes what is computed.
ROPE_KEYS: Mapping[str, Key] = {
    "rope_type": _one_of("default", also=("type",)),
    "rope_theta": _READ,
    "partial_rotary_factor": _one_of(1.0),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a file, by the first names of their keys; a null is as good as none.

    Attributes:
        names: the name that the file has for each key.
        wrong: which names of one key contradict each other.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]
    wrong: tuple[str, ...]

    @classmethod
    def of(cls, theirs: Mapping[str, Any], keys: Mapping[str, Key]) -> "Settings":
        """Reads every name of every key."""
        first_names = {name: key for key in keys for name in (key, *keys[key].also)}
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        wrong = []
        for name, value in theirs.items():
            if value is None:
                continue
            key = first_names.get(name, name)
            if key in values and values[key] != value:
                wrong.append(
                    f"{names[key]}={values[key]!r} and {name}={value!r} contradict each other"
                )
            values.setdefault(key, value)
            names.setdefault(key, name)
        return cls(values, names, tuple(wrong))

    def find_missing(self, needed: Iterable[str]) -> list[str]:
        """The keys that must be there, and are not."""
        return [f"{key} is missing" for key in needed if key not in self.values]

    def find_refused(self, keys: Mapping[str, Key]) -> list[str]:
        """The settings with values that are not computed here."""
        return [
            f"{self.names[name]}={self.values[name]!r} must be {key.values[0]!r}"
            for name, key in keys.items()
            if key.fate == "one_of" and name in self.values and not key.allows(self.values[name])
        ]

    def find_unknown(self, keys: Mapping[str, Key]) -> list[str]:
        """The settings that are not in the table, or whose value has no effect here but elsewhere.

        Long values are cut.
        """
        return [
            f"{name if name.isprintable() else repr(name)}={value!r:.60}"
            for name, value in self.values.items()
            if name not in keys or (keys[name].fate == "no_effect" and not keys[name].allows(value))
        ]
