"""Files beside the weights that contradict each other, or cannot be followed, are refused by name.

Other files of this kind: `test_hostile_folders`.
"""

from typing import Any

import pytest

from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from tests.checkpoint.side_folders import CHATML, END, START, Files, describe, write

WRONG: dict[str, tuple[Files, dict[str, Any], tuple[str, ...]]] = {
    "an end beyond the vocabulary": ({}, {"eos_token_id": 412}, ("config.json", "412", "0 to 411")),
    "an end in a list beyond it": ({}, {"eos_token_id": [2, 412]}, ("config.json", "412")),
    "an end in the other file beyond it": (
        {"generation_config.json": {"eos_token_id": [2, -1]}},
        {},
        ("generation_config.json", "eos_token_id has the id -1"),
    ),
    "an end that is text": ({}, {"eos_token_id": "</s>"}, ("config.json", "'</s>'")),
    "an end that is no number": ({}, {"eos_token_id": True}, ("config.json", "True")),
    "an added token beyond the vocabulary": (
        {"added_tokens.json": {"<x>": 412}},
        {},
        ("added_tokens.json", "'<x>'", "412"),
    ),
    "an added token with two ids": (
        {
            "added_tokens.json": {"<x>": END},
            "tokenizer_config.json": {"added_tokens_decoder": describe(("<x>", START, True))},
        },
        {},
        ("'<x>' with id 401", "'<x>' with id 400"),
    ),
    "two added tokens with one id": (
        {
            "added_tokens.json": {"<x>": END},
            "tokenizer.json": {"added_tokens": [{"id": END, "content": "<y>"}]},
        },
        {},
        ("tokenizer.json has the added token '<y>'", "added_tokens.json has '<x>'"),
    ),
    "an added token in the place of a piece": (
        {"added_tokens.json": {"<|im_end|>": 2}},
        {},
        ("'<|im_end|>' has the id 2, which is '</s>'",),
    ),
    "an added token with the text of a piece": (
        {"added_tokens.json": {"</s>": END}},
        {},
        ("'</s>' with id 400 is a piece",),
    ),
    "an added word": (
        {"tokenizer_config.json": {"added_tokens_decoder": describe(("covfefe", END, False))}},
        {},
        ("'covfefe'", "user-defined"),
    ),
    "an added token without a text": (
        {"tokenizer.json": {"added_tokens": [{"id": END}]}},
        {},
        ("tokenizer.json", "None", "must be a text"),
    ),
    "other ids of pieces": (
        {"tokenizer.json": {"model": {"vocab": {"<s>": 1, "</s>": 3}}}},
        {},
        ("tokenizer.json", "'</s>' has the id 3 there and 2 in tokenizer.model"),
    ),
    "an end that is no piece": (
        {"special_tokens_map.json": {"eos_token": "<|im_end|>"}},
        {},
        ("eos_token '<|im_end|>'", "no added token"),
    ),
    "ends that differ": (
        {
            "added_tokens.json": CHATML,
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            "tokenizer_config.json": {"eos_token": {"content": "</s>"}},
        },
        {},
        ("'<|im_end|>' in special_tokens_map.json", "'</s>' in tokenizer_config.json"),
    ),
    "another beginning": (
        {"tokenizer_config.json": {"bos_token": "</s>"}},
        {},
        ("bos_token is '</s>'", "'<s>'"),
    ),
    "templates that differ": (
        {"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"},
        {},
        ("tokenizer_config.json and chat_template.jinja differ",),
    ),
    "a template that is a number": (
        {"chat_template.json": {"chat_template": 3}},
        {},
        ("chat_template.json", "must be a text"),
    ),
    "files that are no objects": (
        {"generation_config.json": []},
        {},
        ("generation_config.json", "object"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_contradicts_itself_or_cannot_be_followed_is_refused_by_name(kind, folder):
    files, config, words = WRONG[kind]
    with pytest.raises(ConfigError) as error:
        open_weights(write(folder, files, **config))
    for word in words:
        assert word in str(error.value)
