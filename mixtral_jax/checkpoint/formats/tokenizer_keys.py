"""What happens to each key of a tokenizer_config.json, as `config_keys` says it of a config.json.

`special_tokens` and `reading_side_files` read special tokens, added tokens and templates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixtral_jax.checkpoint.formats.config_keys import Key, Settings

_READ, _KEPT, _NO_EFFECT = Key("read"), Key("kept"), Key("no_effect")

SPECIAL_TOKENS: Mapping[str, Key] = dict.fromkeys(
    (
        *("bos_token", "eos_token", "unk_token", "pad_token"),
        *("cls_token", "sep_token", "mask_token"),
        *("additional_special_tokens", "extra_special_tokens"),
    ),
    _READ,
)
# They change the ids that a text becomes.
_OF_TEXTS = {
    "tokenizer_class": Key(
        "one_of",
        (
            *("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizer"),
            *("PreTrainedTokenizerFast", "TokenizersBackend", "SentencePieceBackend"),
            *("MistralCommonTokenizer", "MistralCommonBackend"),
        ),
    ),
    "auto_map": Key("one_of", (None,)),
    "add_bos_token": Key("one_of", (True,)),
    "add_eos_token": Key("one_of", (False,)),
    "sp_model_kwargs": Key("one_of", ({}, {"enable_sampling": False})),
    "do_lower_case": Key("one_of", (False,)),
    "remove_space": Key("one_of", (False,)),
    "keep_accents": Key("one_of", (True,)),
    "strip_accents": Key("one_of", (False,)),
}
# They say how other programs fill rows up, cut them, and show text; ids stay the same.
_OF_OTHER_PROGRAMS = {
    "clean_up_tokenization_spaces": Key("kept", (False,)),
    "spaces_between_special_tokens": Key("kept", (False,)),
    "split_special_tokens": Key("kept", (False,)),
    "padding_side": _KEPT,
    "truncation_side": _KEPT,
    "model_input_names": _KEPT,
}
_WITHOUT_EFFECT = dict.fromkeys(
    (
        # It decides what follows a special token in a text, and here no text encodes to one.
        "legacy",
        *("backend", "from_slow", "is_local", "local_files_only", "name_or_path"),
        *("processor_class", "special_tokens_map_file", "tokenizer_file", "transformers_version"),
        *("trust_remote_code", "use_fast", "vocab_file"),
    ),
    _NO_EFFECT,
) | {"use_default_system_prompt": Key("no_effect", (False,))}
KEYS: Mapping[str, Key] = (
    SPECIAL_TOKENS
    | {"added_tokens_decoder": _READ, "chat_template": _READ}
    | _OF_TEXTS
    | _OF_OTHER_PROGRAMS
    | _WITHOUT_EFFECT
)
# What transformers writes for a tokenizer without a limit.
_NO_LIMITS = (int(1e30), int(1e20))


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The keys of a tokenizer_config.json that are not followed here.

    Attributes:
        kept: those that an export has again.
        refused: those that give texts other ids, in words.
        unread: those that nobody here knows, in words.
    """

    kept: Mapping[str, Any]
    refused: tuple[str, ...]
    unread: tuple[str, ...]


def read_settings(
    theirs: Mapping[str, Any], *, adds_space: bool, context_length: Any
) -> TokenizerSettings:
    """Sorts the keys of a tokenizer_config.json.

    Args:
        adds_space: whether tokenizer.model puts a space before a text.
        context_length: that of the model, which an export has as `model_max_length`.
    """
    keys = {
        **KEYS,
        "add_prefix_space": Key("one_of", (adds_space,)),
        "model_max_length": Key("kept", (context_length, *_NO_LIMITS)),
    }
    settings = Settings.of(theirs, keys)
    kept = {
        name: value
        for name, value in settings.values.items()
        if name in keys
        and keys[name].fate == "kept"
        and not (keys[name].values and keys[name].allows(value))
    }
    return TokenizerSettings(
        kept, tuple(settings.find_refused(keys)), tuple(settings.find_unknown(keys))
    )
