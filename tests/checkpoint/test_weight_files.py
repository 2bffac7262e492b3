"""Which files of a folder hold the weights; what is left unread; what only looks like weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE, LAYOUTS, MISTRAL
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from tests.checkpoint.folders import (
    SMALL,
    random_parameters,
    read_all,
    tensors_of,
    write_config,
    write_index,
    write_params,
)
from tests.checkpoint.refusals import FILE, write_good_folder

LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LEFTOVER = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def edit_tensors(folder: Path, *removed: str, **added: np.ndarray) -> None:
    tensors = load_file(folder / FILE) | added
    save_file({name: tensors[name] for name in tensors if name not in removed}, folder / FILE)


@pytest.mark.parametrize("has_both", [False, True])
def test_tied_embeddings_are_two_equal_arrays_here(has_both, folder):
    write_good_folder(folder)
    write_config(folder, SMALL, tie_word_embeddings=True)
    edit_tensors(folder, LM_HEAD)
    if has_both:
        edit_tensors(folder, **{LM_HEAD: load_file(folder / FILE)[EMBEDDING]})
    weights = open_weights(folder)
    arrays = read_all(weights)
    np.testing.assert_array_equal(arrays["unembed/weight"], arrays["embedding_VD"].T)
    (note,) = weights.notes
    assert "tie_word_embeddings=True" in note
    assert not weights.architecture.ties_embeddings


def test_an_unembedding_is_missed_unless_the_config_ties_it(folder):
    write_good_folder(folder)
    edit_tensors(folder, LM_HEAD)
    with pytest.raises(ConfigError, match=f"{LM_HEAD} is missing"):
        open_weights(folder)
    write_config(folder, SMALL, tie_word_embeddings="false")
    with pytest.raises(ConfigError, match="tie_word_embeddings='false' must be true or false"):
        open_weights(folder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_leftover_frequencies_of_positions_are_ignored(layout, tmp_path):
    parameters = random_parameters(SMALL)
    names = ["rotary_emb.inv_freq", LEFTOVER.format(0), LEFTOVER.format(1)]
    frequencies = {name: np.ones(2, np.float32) for name in names}
    (write_config if "Hugging" in layout.name else write_params)(tmp_path, SMALL)
    stem = "model" if "Hugging" in layout.name else "consolidated"
    tensors = tensors_of(layout, parameters, SMALL) | frequencies
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    weights = open_weights(tmp_path)
    for name, array in read_all(weights).items():
        np.testing.assert_array_equal(array, parameters[name])
    assert weights.notes == ()


def test_other_leftovers_are_unexpected(folder):
    write_good_folder(folder)
    edit_tensors(folder, **{"model.rotary_emb.other": np.ones(2, np.float32)})
    with pytest.raises(ConfigError, match=r"rotary_emb\.other in model\.safetensors is unexpected"):
        open_weights(folder)


def test_weights_that_are_not_read_are_told(folder):
    write_good_folder(folder)
    others = ("consolidated.00.pth", "pytorch_model.bin", "model-00001-of-00002.safetensors")
    for name in others:
        (folder / name).touch()
    (note,) = open_weights(folder).notes
    assert f"not read: {', '.join(sorted(others))}" in note


@pytest.mark.parametrize(
    "name",
    [
        *("tekken.json", "tokenizer.model.v7", "vocab.json", "merges.txt", "modeling_mixtral.py"),
        *("preprocessor_config.json", "chat_template.j2", "future", "PARAMS.JSON", "a\tb"),
    ],
)
def test_a_file_that_nothing_reads_is_told(name, folder):
    write_good_folder(folder)
    (folder / name).touch()
    (note,) = open_weights(folder).notes
    assert note.endswith(f"not read: {name if name.isprintable() else repr(name)}")


def test_of_many_files_that_nothing_reads_weights_are_named_first_and_others_counted(folder):
    write_good_folder(folder)
    for name in ("z.bin", *(f"{i:02}.json" for i in range(25))):
        (folder / name).touch()
    (note,) = open_weights(folder).notes
    assert "not read: z.bin, 00.json, " in note and note.endswith("18.json, and 6 more")


def test_files_for_people_and_hidden_ones_are_not_told(folder):
    write_good_folder(folder)
    for name in ("README.md", "LICENSE", "license.txt", "Notice", "USE.md", "a.PNG", ".gitignore"):
        (folder / name).touch()
    (folder / "original").mkdir()
    assert open_weights(folder).notes == ()


def test_a_file_and_an_index_of_others_are_refused(folder):
    write_good_folder(folder)
    names = dict.fromkeys(load_file(folder / FILE), FILE)
    write_index(folder, "model", names)
    assert open_weights(folder).notes == ()
    write_index(folder, "model", names | {LM_HEAD: "model-00001-of-00002.safetensors"})
    with pytest.raises(ConfigError, match=r"both model.safetensors and model.safetensors.index"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"vocab_size": 32}, None),
        ({"rope_theta": 1e6}, r"model.rope_theta is 50000.0 and 1000000.0"),
        ({"rope_theta": None}, r"model.rope_theta is 50000.0 and 1000000.0"),
        ({"norm_eps": 1e-5}, r"model.norm_eps is 1e-06 and 1e-05"),
        (
            {"moe": {"num_experts": 5, "num_experts_per_tok": 3}},
            r"router.num_experts_per_token is 2 and 3",
        ),
    ],
)
def test_two_configs_of_one_folder_must_agree(changes, words, folder):
    write_good_folder(folder)
    write_params(folder, SMALL, **changes)
    if words is None:
        assert open_weights(folder).notes == ()
        return
    with pytest.raises(ConfigError, match=rf"config.json and params.json .*: {words}"):
        open_weights(folder)


def test_a_second_config_that_cannot_be_read_is_told(folder):
    write_good_folder(folder)
    write_params(folder, SMALL, yarn={"factor": 4})
    (note,) = open_weights(folder).notes
    assert "params.json is not read" in note and "yarn is not a key" in note


def write_peft(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def test_adapters_alone_are_named_with_the_fix(folder):
    write_peft(folder)
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"adapters of PEFT alone.*'org/base'.*merge_and_unload"):
        open_weights(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "lora.safetensors").touch()
    with pytest.raises(ConfigError, match=r"adapters of Mistral alone \(lora.safetensors\)"):
        open_weights(folder)


def test_a_whole_cache_is_named_with_the_fix(tmp_path):
    make_cache(tmp_path, "a", main="a")
    with pytest.raises(ConfigError, match=r"cache of Hugging Face.*such as .*models--org--name"):
        open_weights(tmp_path)


def test_adapters_beside_weights_are_refused(folder):
    write_good_folder(folder)
    write_peft(folder)
    with pytest.raises(ConfigError, match=r"adapter_config.json beside the weights.*merge them"):
        open_weights(folder)


def test_shards_without_their_index_are_named(folder):
    write_good_folder(folder)
    (folder / FILE).rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ConfigError, match=r"00001.safetensors belong to an index.*index.json"):
        open_weights(folder)


def make_cache(tmp_path: Path, *names: str, main: str | None) -> Path:
    """The folder of a model in a cache with empty snapshots, and its first one with weights."""
    root = tmp_path / "models--org--name"
    for name in names:
        (root / "snapshots" / name).mkdir(parents=True)
    write_good_folder(root / "snapshots" / names[0])
    (root / "refs").mkdir()
    if main is not None:
        (root / "refs" / "main").write_text(main)
    return root


@pytest.mark.parametrize(
    ("names", "main"), [(["a"], None), (["a"], "gone"), (["a", "b"], "a"), (["a", "b"], "a\n")]
)
def test_of_a_model_in_a_cache_the_snapshot_of_main_or_the_only_one_is_read(names, main, tmp_path):
    root = make_cache(tmp_path, *names, main=main)
    weights = open_weights(root)
    assert read_all(weights).keys() == random_parameters(SMALL).keys()
    assert weights.notes == (f"reads {root / 'snapshots' / 'a'}, a snapshot in a cache",)


@pytest.mark.parametrize("main", [None, "gone", "../../elsewhere"])
def test_of_several_snapshots_one_must_be_named(main, tmp_path):
    root = make_cache(tmp_path, "a", "b", main=main)
    with pytest.raises(ConfigError, match=r"cache .* 2 snapshots, a, b: name one as .*/HASH"):
        open_weights(root)


def test_the_layout_of_an_unread_second_set_of_weights_does_not_matter(folder):
    """Mistral's own repositories have both sets."""
    write_good_folder(folder)
    write_params(folder, SMALL)
    save_file(
        tensors_of(MISTRAL, random_parameters(SMALL), SMALL), folder / "consolidated.safetensors"
    )
    weights = open_weights(folder)
    assert weights.source == HUGGING_FACE.name
    assert "not read: consolidated.safetensors" in weights.notes[0]
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == SMALL.hidden_size
