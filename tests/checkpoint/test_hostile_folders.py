"""Folders that are damaged or hostile are refused with one line that says what is wrong and where.

Each kind of damage is a function that damages a good folder, with words of the error message. Other
files of this kind: `test_hostile_safetensors`, `test_hostile_pickles`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from tests.checkpoint.folders import (
    SMALL,
    random_parameters,
    tensors_of,
    write_config,
    write_index,
    write_shards,
)
from tests.checkpoint.refusals import (
    FILE,
    W2,
    Kind,
    Spoil,
    check_refusal,
    edit_raw,
    link_outside,
    write_good_folder,
    write_raw,
)

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return spoil


def edit_config(**changes: Any) -> Spoil:
    return lambda folder: write_config(folder, SMALL, **changes)


def replace_by_folder(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def replace_by_pipe(folder: Path) -> None:
    """Replaces the file by a pipe; opening it would never return."""
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def link_to(target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / FILE).symlink_to(target)

    return spoil


def name_as_qwen(tensors: dict[str, np.ndarray]) -> None:
    """Uses Qwen's names, with which transformers would leave the experts of a Mixtral random."""
    for name in list(tensors):
        new = name.replace("block_sparse_moe", "mlp")
        for theirs, qwen in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            new = new.replace(f".{theirs}.", f".{qwen}.")
        tensors[new] = tensors.pop(name)


def name_as_nobody(tensors: dict[str, np.ndarray]) -> None:
    for number, name in enumerate(list(tensors)):
        tensors[f"h.{number}.c_attn"] = tensors.pop(name)


FILES = {
    "a folder in the place of a file": Kind(replace_by_folder, (FILE, "not a regular file")),
    "a pipe in the place of a file": Kind(replace_by_pipe, (FILE, "not a regular file")),
    "weights that link outside": Kind(link_outside(FILE), (FILE, "symbolic link", "secret")),
    "a config that links outside": Kind(
        link_outside("config.json"), ("config.json", "symbolic link", "secret")
    ),
    "a link to nothing": Kind(link_to("elsewhere.safetensors"), (FILE, "links to nothing")),
    "a link to itself": Kind(link_to(FILE), (FILE, "links to nothing, or to itself")),
    "no weights": Kind(lambda folder: (folder / FILE).unlink(), (FILE, "no weights")),
    "weights as a pickle alone": Kind(
        lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"),
        ("pytorch_model.bin", "may run code"),
    ),
    "no config": Kind(lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
    "a tokenizer that is none": Kind(
        write_raw("tokenizer.model", b"none"), ("tokenizer.model", "not a SentencePiece")
    ),
}
ACCOUNTS = {
    "a tensor too few": Kind(edit_tensors(lambda tensors: tensors.pop(W2)), (f"{W2} is missing",)),
    "a tensor too many": Kind(
        edit_tensors(lambda tensors: tensors.update(more=np.zeros(3, np.float32))),
        (FILE, "more in", "is unexpected"),
    ),
    "a transposed matrix": Kind(
        edit_tensors(lambda tensors: tensors.update({W2: tensors[W2].T.copy()})),
        (FILE, W2, "(10, 12), not (12, 10)"),
    ),
    "an expert too many": Kind(
        edit_config(num_local_experts=6), ("experts.5.w1.weight is missing", "has shape (5, 12)")
    ),
    "names of Qwen": Kind(
        edit_tensors(name_as_qwen),
        ("experts.3.w2.weight is missing", "experts.3.down_proj.weight in"),
    ),
    "names of nobody": Kind(edit_tensors(name_as_nobody), ("h.0.c_attn", "no known layout")),
}
CONFIGS = {
    "a config that is no JSON": Kind(write_raw("config.json", b"{,}"), ("config.json", "not JSON")),
    "a config that is a list": Kind(
        write_raw("config.json", b"[]"), ("config.json", "JSON object")
    ),
    "a config that is no text": Kind(
        write_raw("config.json", b"\xff\xfe\x00"), ("config.json", "not JSON")
    ),
    "another kind of model": Kind(
        edit_config(model_type="qwen2_moe"), ("config.json", "model_type='qwen2_moe'")
    ),
    "quantized weights": Kind(
        edit_config(quantization_config={"bits": 4}), ("config.json", "quantization_config=")
    ),
    "tied embeddings": Kind(
        edit_config(tie_word_embeddings=True),
        ("tie_word_embeddings=True", "differ in rows 0 to 20"),
    ),
    "a sliding window": Kind(edit_config(sliding_window=63), ("config.json", "sliding_window=63")),
    "stretched positions": Kind(
        edit_config(rope_parameters={"rope_type": "yarn"}),
        ("config.json", "rope_type='yarn' must be 'default'"),
    ),
    "two bases of positions": Kind(
        edit_config(rope_theta=1e4),
        ("config.json", "rope_theta=10000.0 and rope_parameters.rope_theta=50000.0"),
    ),
    "a base of positions that is none": Kind(
        edit_config(rope_theta=0, rope_parameters=None),
        ("config.json", "rope_theta=0", "must be over 1"),
    ),
    "a base of positions that is text": Kind(
        edit_config(rope_theta="1e6", rope_parameters=None),
        ("config.json", "rope_theta='1e6'", "number"),
    ),
    "a billion layers": Kind(
        edit_config(num_hidden_layers=10**9), ("1,000,000,000 layers", "tensors")
    ),
    "a vocabulary below zero": Kind(edit_config(vocab_size=-1), ("config.json", "vocab_size=-1")),
    "sizes that are text": Kind(edit_config(hidden_size="12"), ("config.json", "hidden_size='12'")),
    "sizes that are no number": Kind(
        edit_config(rms_norm_eps=float("nan")), ("config.json", "norm_eps=nan")
    ),
    "keys that are missing": Kind(
        edit_config(num_local_experts=None), ("config.json", "num_local_experts is missing")
    ),
    "more experts a token than there are": Kind(
        edit_config(num_experts_per_tok=9),
        ("config.json", "num_experts_per_token=9", "num_experts=5"),
    ),
    "a head of odd size": Kind(edit_config(head_dim=5), ("config.json", "head_dim=5", "even")),
}


def edit_index(change: Callable[[dict[str, str]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(folder, "model", weight_map)

    return spoil


def name_file(name: str) -> Spoil:
    return edit_index(lambda weight_map: weight_map.update({W2: name}))


INDICES = {
    "an index with an absolute path": Kind(
        name_file("/etc/passwd"), ("'/etc/passwd'", "without /")
    ),
    "an index that climbs": Kind(name_file(f"../{SHARD}"), (f"'../{SHARD}'", "without /")),
    "an index that names the folder above": Kind(name_file(".."), (INDEX, "'..'")),
    "an index into a folder": Kind(name_file(f"more/{SHARD}"), (f"'more/{SHARD}'", "without /")),
    "an index with a backslash": Kind(name_file("..\\x.safetensors"), ("without /",)),
    "an index of pickles": Kind(
        name_file("pytorch_model.bin"), (INDEX, "'pytorch_model.bin'", ".safetensors")
    ),
    "an index of numbers": Kind(
        edit_index(lambda weight_map: weight_map.update({W2: 3})), (INDEX, "weight_map")
    ),
    "an index of nothing": Kind(write_raw(INDEX, b'{"weight_map": []}'), (INDEX, "weight_map")),
    "an index that is no JSON": Kind(write_raw(INDEX, b"weight_map"), (INDEX, "not JSON")),
    "a shard that is not there": Kind(
        lambda folder: (folder / SHARD).unlink(), (INDEX, SHARD, "not in the folder")
    ),
    "a shard that links outside": Kind(link_outside(SHARD), (SHARD, "symbolic link", "secret")),
    "a truncated shard": Kind(edit_raw(SHARD, lambda raw: raw[:-9]), (SHARD, "truncated")),
    "an index of a tensor that is not there": Kind(
        edit_index(lambda weight_map: weight_map.update(ghost=SHARD)),
        (INDEX, "ghost", "is not in", SHARD),
    ),
    "a tensor that the index leaves out": Kind(
        edit_index(lambda weight_map: weight_map.pop(W2)),
        (INDEX, W2, "which the index does not say"),
    ),
}


@pytest.mark.parametrize("kind", [*FILES, *ACCOUNTS, *CONFIGS])
def test_a_damaged_folder_is_refused(kind, folder):
    write_good_folder(folder)
    check_refusal((FILES | ACCOUNTS | CONFIGS)[kind], folder)


@pytest.mark.parametrize("kind", INDICES)
def test_a_damaged_index_is_refused(kind, folder):
    write_config(folder, SMALL)
    write_shards(folder, "model", tensors_of(HUGGING_FACE, random_parameters(SMALL), SMALL), 2)
    check_refusal(INDICES[kind], folder)


def test_a_snapshot_may_not_link_beside_its_own_blobs(tmp_path):
    snapshot = tmp_path / "models--a" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    other = tmp_path / "models--b" / "blobs"
    other.mkdir(parents=True)
    (other / "c").write_text("{}")
    (snapshot / FILE).symlink_to(other / "c")
    with pytest.raises(ConfigError, match="symbolic link"):
        open_weights(snapshot)
