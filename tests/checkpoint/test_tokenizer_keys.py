"""Each key of a tokenizer_config.json is followed, kept, refused by name, told, or of no effect."""

import json
from typing import Any

import pytest

from mixtral_jax.checkpoint.export import find_lost, make_small_files
from mixtral_jax.checkpoint.formats.tokenizer_json import make_tokenizer_json
from mixtral_jax.checkpoint.formats.tokenizer_keys import KEYS
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.config import ConfigError
from tests.checkpoint.side_folders import CHATML, MODEL, describe, write
from tests.data.chat_cases import train_tokenizer

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
NO_LIMIT = 1000000000000000019884624838656
# As the published folders of Mixtral have it.
PUBLISHED: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(id_): {
            "content": text,
            "special": True,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
        for id_, text in enumerate(("<unk>", "<s>", "</s>"))
    },
    "additional_special_tokens": [],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": NO_LIMIT,
    "pad_token": None,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}


def open_with(folder, settings: Any, **files: Any) -> Weights:
    return open_weights(write(folder, {CONFIG: settings, "added_tokens.json": {}, **files}))


def export(weights: Weights) -> dict[str, Any]:
    return json.loads(make_small_files(weights, "hf")[CONFIG])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"legacy": False, "tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": None},
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}},
        {"add_prefix_space": True, "sp_model_kwargs": None, "model_max_length": 1e30},
    ],
    ids=str,
)
def test_what_published_folders_and_transformers_write_is_opened_without_a_note(changes, folder):
    weights = open_with(folder, PUBLISHED | changes)
    assert weights.notes == () and weights.side_files.tokenizer_settings == {}


def test_our_own_export_is_opened_without_a_note(folder):
    weights = open_with(folder, PUBLISHED)
    again = open_with(folder, export(weights))
    assert again.notes == () and again.side_files == open_with(folder, export(again)).side_files


REFUSED = {name: "strange" for name, key in KEYS.items() if key.fate == "one_of"} | {
    "add_prefix_space": False,
    "add_bos_token": False,
    "add_eos_token": True,
    "sp_model_kwargs": {"enable_sampling": True},
    "tokenizer_class": "GPT2Tokenizer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_texts_other_ids_is_refused_by_name(name, folder):
    with pytest.raises(ConfigError) as error:
        open_with(folder, PUBLISHED | {name: REFUSED[name]})
    assert f"{CONFIG}: {name}={REFUSED[name]!r} must be " in str(error.value)
    # Without a tokenizer.model the tokenizer is not the folder's.
    (folder / "tokenizer.model").unlink()
    assert any(f"{name}={REFUSED[name]!r}" in note for note in open_weights(folder).notes)


@pytest.mark.parametrize("adds_space", [True, False])
def test_the_space_before_a_text_must_be_as_in_the_tokenizer(adds_space, folder):
    write(folder, {CONFIG: {"add_prefix_space": adds_space}})
    train_tokenizer(add_dummy_prefix=adds_space).save(folder / "tokenizer.model")
    assert open_weights(folder).notes == ()
    (folder / CONFIG).write_text(json.dumps({"add_prefix_space": not adds_space}))
    with pytest.raises(ConfigError, match=f"add_prefix_space={not adds_space} must be"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clean_up_tokenization_spaces", True),
        ("spaces_between_special_tokens", True),
        ("split_special_tokens", True),
        ("padding_side", "left"),
        ("truncation_side", "left"),
        ("model_input_names", ["input_ids"]),
        ("model_max_length", 128),
        ("cls_token", "<s>"),
        ("additional_special_tokens", ["<|im_end|>", "<|im_start|>"]),
        ("extra_special_tokens", {"image_token": "<|im_end|>"}),
        ("extra_special_tokens", ["<|im_end|>"]),
    ],
)
def test_what_other_programs_do_with_the_tokenizer_is_kept_and_told(name, value, folder):
    weights = open_with(folder, PUBLISHED | {name: value}, **{"added_tokens.json": CHATML})
    assert export(weights)[name] == value
    words = f"{name}={value!r}"
    assert any("kept for exports to Hugging Face" in n and words in n for n in weights.notes)
    assert words in "".join(find_lost(weights, "mistral"))


def test_a_length_as_long_as_the_context_says_nothing(folder):
    write(folder, {CONFIG: {"model_max_length": 64}}, max_position_embeddings=64)
    assert open_weights(folder).side_files.tokenizer_settings == {}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (CONFIG, {"foo": 1, "use_default_system_prompt": True}, "foo=1, use_default_system_prompt"),
        (SPECIAL, {"image_token": "<image>"}, "image_token='<image>'"),
        (SPECIAL, {"unk_token": "<s>"}, "unk_token='<s>' is not followed"),
        *(
            (file, {"eos_token": {"content": "</s>", flag: True}}, f"{flag} of '</s>'")
            for file in (CONFIG, SPECIAL)
            for flag in ("lstrip", "rstrip", "single_word", "normalized")
        ),
        (CONFIG, {"added_tokens_decoder": {"2": {"content": "</s>", "lstrip": True}}}, "lstrip of"),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": 2, "content": "</s>", "rstrip": True}]},
            "rstrip of '</s>'",
        ),
    ],
)
def test_what_is_neither_followed_nor_kept_is_told(file, content, words, folder):
    (note,) = open_weights(write(folder, {file: content})).notes
    assert words in note


def test_templates_of_a_folder_for_more_of_them_are_told(folder):
    write(folder, {})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (note,) = open_weights(folder).notes
    assert "additional_chat_templates: the chat templates tool_use are not read" in note


@pytest.mark.parametrize("file", [CONFIG, SPECIAL])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("additional_special_tokens", ["<|nowhere|>"]),
        ("additional_special_tokens", [{"content": "<|nowhere|>"}]),
        ("extra_special_tokens", {"image_token": "<|nowhere|>"}),
        ("mask_token", "<|nowhere|>"),
    ],
)
def test_a_special_token_without_an_id_is_refused(file, key, value, folder):
    with pytest.raises(ConfigError, match=r"special token '<\|nowhere\|>' is no piece"):
        open_weights(write(folder, {file: {key: value}}))


def test_lists_of_special_tokens_that_differ_are_refused(folder):
    files = {CONFIG: {"additional_special_tokens": ["<s>"]}}
    with pytest.raises(ConfigError, match=r"additional_special_tokens is \['</s>'\] in special_"):
        open_weights(write(folder, files | {SPECIAL: {"additional_special_tokens": ["</s>"]}}))


WORD = MODEL.vocab_size - 1


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"hello": WORD}},
        {CONFIG: {"added_tokens_decoder": describe(("hello", WORD, False))}},
        {CONFIG: {"added_tokens_decoder": {str(WORD): {"content": "hello"}}}},
        {"tokenizer.json": {"added_tokens": [{"id": WORD, "content": "hello"}]}},
    ],
)
def test_an_added_word_is_refused_unless_a_file_says_that_it_is_special(files, folder):
    with pytest.raises(ConfigError, match="the added tokens 'hello' are words"):
        open_weights(write(folder, files))
    special = {"added_tokens": [{"id": WORD, "content": "hello", "special": True}]}
    for more in ({SPECIAL: {"pad_token": "hello"}}, {"tokenizer.json": special}):
        weights = open_weights(write(folder, files | more))
        assert weights.side_files.added_tokens == {"hello": WORD}
        (folder / SPECIAL).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer 'Lowercase'"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend"}, {"type": "NFC"}],
                }
            },
            "normalizer 'NFC'",
        ),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer 'ByteLevel'"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}},
            "pre_tokenizer 'Digits'",
        ),
        ({"normalizer": "lower"}, "normalizer"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "model.dropout=0.1"),
    ],
)
def test_a_tokenizer_json_with_steps_that_tokenizer_model_has_not_is_refused(
    tmp_path, tokenizer, words
):
    with pytest.raises(ConfigError, match=f"tokenizer.json: {words}.* other ids"):
        open_with(tmp_path, {}, **{"tokenizer.json": tokenizer})


@pytest.mark.parametrize(
    "tokenizer",
    [
        make_tokenizer_json(train_tokenizer()),
        {"pre_tokenizer": {"type": "Metaspace"}, "normalizer": None, "model": {"dropout": None}},
        {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled"}]},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace"}],
            },
        },
    ],
    ids=["as exported here", "BPE", "unigram"],
)
def test_a_tokenizer_json_as_transformers_makes_it_is_taken(tmp_path, tokenizer):
    open_with(tmp_path, {}, **{"tokenizer.json": tokenizer})
