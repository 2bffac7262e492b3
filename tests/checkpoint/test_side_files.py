"""What a folder says beside its weights is followed, kept by runs and exports, or named."""

import dataclasses
import json
from pathlib import Path

import pytest

from mixtral_jax.checkpoint.export import Format, find_lost, require_exportable, write_folder
from mixtral_jax.checkpoint.formats.chat_templates import CHAT_TEMPLATES
from mixtral_jax.checkpoint.formats.side_files import SideFiles, open_side_files
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.config import ConfigError
from mixtral_jax.runs.import_weights import import_weights
from tests.checkpoint.side_folders import (
    CHATML,
    END,
    NUM_PIECES,
    START,
    Files,
    describe,
    tokenizer,
    write,
)
from tests.data.chat_cases import train_tokenizer


def export(weights: Weights, folder: Path, format_: Format = "hf") -> Path:
    folder.mkdir()
    write_folder(weights, folder, format_, lambda _: None)
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "special", "expected"),
    [
        (2, None, None, (2,)),
        (None, None, None, ()),
        (5, None, None, (5,)),
        ([5, 2], None, None, (5, 2)),
        (None, 5, None, (5,)),
        (2, [7, 5], None, (2, 7, 5)),
        ([2, 7], [7, 2], None, (2, 7)),
        (2, 2, "<|im_end|>", (2, END)),
        (END, None, "<|im_end|>", (END,)),
        (None, None, {"content": "</s>", "lstrip": False}, (2,)),
    ],
)
def test_texts_end_at_each_id_that_any_file_names(config, generation, special, expected, folder):
    files = {"added_tokens.json": CHATML}
    files |= {} if generation is None else {"generation_config.json": {"eos_token_id": generation}}
    files |= {} if special is None else {"special_tokens_map.json": {"eos_token": special}}
    assert open_weights(write(folder, files, eos_token_id=config)).side_files.eos_ids == expected


def test_added_tokens_become_control_pieces_and_ids_between_them_are_unused(folder):
    added = {"<|im_end|>": NUM_PIECES + 2, "[PAD]": NUM_PIECES + 5}
    weights = open_weights(write(folder, {"added_tokens.json": added}, eos_token_id=[2, 410]))
    found = weights.tokenizer
    assert found is not None
    assert found.vocab_size == 411
    assert [found.control_id(text) for text in added] == list(added.values())
    named = {402, 405, 410}
    assert set(found.unused_ids) == set(range(NUM_PIECES, 411)) - named
    for text in ("def main(x): <|im_end|>", "[PAD] </s>"):
        assert found.encode(text) == tokenizer().encode(text)
        assert found.decode([1, *found.encode(text), 402, 410]) == text
    assert any("<|im_end|> (402), [PAD] (405)" in note for note in weights.notes)


def test_a_mark_that_a_file_calls_not_special_is_a_control_piece_too(folder):
    tokens = describe(("<|im_end|>", END, True), ("<|im_start|>", START, False))
    weights = open_weights(
        write(folder, {"tokenizer_config.json": {"added_tokens_decoder": tokens}})
    )
    assert weights.side_files.added_tokens == CHATML


KEPT: Files = {
    "added_tokens.json": CHATML,
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<unk>"},
    "generation_config.json": {
        "eos_token_id": [END, 2],
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.6,
        "use_cache": True,
    },
    "tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ ours }}"}]},
}


def test_a_run_and_its_export_keep_what_the_folder_said(folder):
    weights = open_weights(write(folder, KEPT, eos_token_id=END))
    import_weights(weights, folder.parent / "run")
    of_run = open_weights(folder.parent / "run")
    assert of_run.side_files == weights.side_files
    # What people were told of the folder holds for the run.
    assert of_run.notes == weights.notes
    exported = export(of_run, folder.parent / "out")
    read = {path.name: json.loads(path.read_text()) for path in exported.glob("*.json")}
    for name in ("config.json", "generation_config.json"):
        assert (read[name]["eos_token_id"], read[name]["pad_token_id"]) == ([END, 2], 0)
    for key in ("do_sample", "temperature", "use_cache"):
        assert read["generation_config.json"][key] == KEPT["generation_config.json"][key]
    told = {key: read["tokenizer_config.json"][key] for key in ("eos_token", "pad_token")}
    assert told == KEPT["special_tokens_map.json"]
    assert read["tokenizer_config.json"]["chat_template"] == "{{ ours }}"
    listed = {token["content"]: token["id"] for token in read["tokenizer.json"]["added_tokens"]}
    assert listed.items() >= CHATML.items()
    again = open_weights(exported).side_files
    assert again == dataclasses.replace(weights.side_files, added_tokens={})


def test_what_is_not_followed_is_told(folder):
    notes = open_weights(write(folder, KEPT, eos_token_id=END)).notes
    assert len(notes) == 3, notes
    for note, words in zip(
        notes,
        ("<|im_end|> (400), <|im_start|> (401)", "do_sample=True, temperature=0.6;", "template v1"),
        strict=True,
    ):
        assert words in note
    assert "use_cache" not in "".join(notes)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"generation_config.json": {"bos_token_id": 2}}, "bos_token_id=2"),
        ({"generation_config.json": {"pad_token_id": -1}}, None),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "x"}]}},
            "chat templates rag",
        ),
    ],
)
def test_what_an_export_cannot_keep_is_told(files, words, folder):
    notes = open_weights(write(folder, files)).notes
    assert len(notes) == (words is not None) and (words or "") in "".join(notes)


@pytest.mark.parametrize("version", CHAT_TEMPLATES)
@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_our_templates_are_known_and_nothing_is_told(version, name, folder):
    text = CHAT_TEMPLATES[version]
    files = {name: text if name.endswith("jinja") else {"chat_template": text + "\n"}}
    weights = open_weights(write(folder, files))
    assert weights.side_files.template == version
    assert weights.notes == ()


def test_a_tuned_model_ends_as_it_was_taught_and_as_before(folder):
    weights = open_weights(write(folder, KEPT, eos_token_id=END))
    tuned = weights.side_files.after_training(tokenizer(), "v3")
    assert tuned.eos_ids == (END, 2)
    assert (tuned.template, tuned.eos_token) == ("v3", None)
    assert tuned.added_tokens == CHATML and tuned.generation["temperature"] == 0.6
    # Trained on text, it keeps its template.
    assert weights.side_files.after_training(tokenizer()) == weights.side_files
    assert SideFiles().after_training(tokenizer()).eos_ids == (2,)


def test_an_end_that_mistral_inference_does_not_know_is_refused_before_anything_is_written(folder):
    weights = open_weights(write(folder, KEPT, eos_token_id=END))
    require_exportable(weights, "hf")
    with pytest.raises(ConfigError, match="ids 400 too"):
        require_exportable(weights, "mistral")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, None),
        ({"generation_config.json": {"use_cache": True}}, None),
        ({"chat_template.jinja": CHAT_TEMPLATES["v1"]}, None),
        ({"chat_template.jinja": "{{ ours }}"}, "the chat template"),
        ({"special_tokens_map.json": {"pad_token": "<unk>"}}, "pad_token=<unk>"),
        (
            {"generation_config.json": {"pad_token_id": 3, "temperature": 0.6, "top_k": 5}},
            "temperature=0.6, top_k=5, pad_token_id=3",
        ),
    ],
)
def test_what_has_no_place_in_mistrals_format_is_told_and_else_kept(files, words, folder):
    weights = open_weights(write(folder, files))
    assert find_lost(weights, "hf") == ()
    lost = find_lost(weights, "mistral")
    assert len(lost) == (words is not None) and (words or "") in "".join(lost)


@pytest.mark.parametrize("own", CHAT_TEMPLATES)
def test_a_tokenizer_has_the_name_of_the_template_that_the_model_has(own, folder):
    write(folder, {"chat_template.jinja": CHAT_TEMPLATES[own]})
    train_tokenizer(control_symbols=["[INST]", "[/INST]"]).save(folder / "tokenizer.model")
    exported = export(open_weights(folder), folder.parent / "out", "mistral")
    name = {"v1": "tokenizer.model", "v3": "tokenizer.model.v3"}[own]
    assert [path.name for path in exported.glob("tokenizer*")] == [name]


def test_an_end_is_found_among_added_tokens_without_a_tokenizer_too(folder):
    files = {"added_tokens.json": CHATML, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}
    write(folder, files | {"tekken.json": "not JSON"})
    (folder / "tokenizer.model").unlink()
    weights = open_weights(folder)
    assert END in weights.side_files.eos_ids
    for told in ("added_tokens.json is not kept", "not read: tekken.json"):
        assert any(told in note for note in weights.notes)


def test_without_a_tokenizer_ids_and_template_are_kept(folder):
    files = {"chat_template.jinja": "{{ ours }}", "tokenizer.json": {"added_tokens": []}}
    write(folder, files, eos_token_id=[2, 5], bos_token_id=7, pad_token_id=0)
    (folder / "tokenizer.model").unlink()
    weights = open_weights(folder)
    assert any("tokenizer.json is not kept" in note for note in weights.notes)
    again = open_weights(export(weights, folder.parent / "out")).side_files
    assert again == weights.side_files
    assert (again.eos_ids, again.bos_id, again.pad_id) == ((2, 5), 7, 0)
    assert again.chat_template == "{{ ours }}"


def test_tokenizers_under_two_names_must_be_the_same(folder):
    write(folder, {})
    tokenizer().save(folder / "tokenizer.model.v3")
    assert open_weights(folder).tokenizer is not None
    train_tokenizer(control_symbols=["[INST]"]).save(folder / "tokenizer.model.v3")
    with pytest.raises(ConfigError, match=r"tokenizer.model and tokenizer.model.v3 are different"):
        open_weights(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"eos_ids": [1], "more": 2}', '{"eos_ids": 1}'])
def test_a_damaged_file_of_a_run_is_refused(content, tmp_path):
    (tmp_path / "side_files.json").write_text(content)
    with pytest.raises(ConfigError, match=r"side_files\.json"):
        open_side_files(tmp_path)
