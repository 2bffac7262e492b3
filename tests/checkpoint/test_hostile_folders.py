"""Folders that are damaged, or made to do harm: refused in a line that says what and where, and
nothing is written.

Each kind is a function that spoils a good folder, and words of the answer. Pickles:
`test_hostile_pickles`.
"""

import json
import os
import struct
import subprocess
import sys
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
    read_all,
    tensors_of,
    write_config,
    write_index,
    write_shards,
)
from tests.checkpoint.refusals import Kind, Spoil, check_refusal, edit_raw, link_outside, write_raw

ROOT = str(Path(__file__).parents[2])
FILE, INDEX, SHARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
)
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


# --- One file of Hugging Face
# -------------------------------------------------------------------------------------


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and numbers."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join_file(
    path: Path, header: bytes | dict[str, Any], numbers: bytes, length: int | None = None
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + numbers)


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        header, numbers = split_file(folder / FILE)
        change(header)
        join_file(folder / FILE, header, numbers)

    return spoil


def edit_entry(**changes: Any) -> Spoil:
    return edit_header(lambda header: header[W2].update(changes))


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return spoil


def replace_header(text: bytes, length: int | None = None) -> Spoil:
    return lambda folder: join_file(folder / FILE, text, b"", length)


def edit_config(**changes: Any) -> Spoil:
    return lambda folder: write_config(folder, SMALL, **changes)


def overlap(header: dict[str, Any]) -> None:
    """One tensor where another of its size lies."""
    header[W2]["data_offsets"] = header[W2.replace("experts.3", "experts.2")]["data_offsets"]


def be_a_folder(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def be_a_pipe(folder: Path) -> None:
    """Whoever opens it waits for ever."""
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def link_to(target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / FILE).symlink_to(target)

    return spoil


def name_as_qwen(tensors: dict[str, np.ndarray]) -> None:
    """transformers takes such names for none of Mixtral's, and starts the experts from noise."""
    for name in list(tensors):
        new = name.replace("block_sparse_moe", "mlp")
        for theirs, qwen in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            new = new.replace(f".{theirs}.", f".{qwen}.")
        tensors[new] = tensors.pop(name)


def name_as_nobody(tensors: dict[str, np.ndarray]) -> None:
    for number, name in enumerate(list(tensors)):
        tensors[f"h.{number}.c_attn"] = tensors.pop(name)


HEADERS = {
    "a header of 2**63 bytes": Kind(replace_header(b"{}", 2**63), (FILE, "header", f"{2**63:,}")),
    "a header longer than the file": Kind(replace_header(b"{}", 1000), (FILE, "header", "1,000")),
    "a file of five bytes": Kind(write_raw(FILE, b"12345"), (FILE, "truncated", "5 bytes")),
    "an empty file": Kind(write_raw(FILE, b""), (FILE, "truncated", "0 bytes")),
    "a header that is no JSON": Kind(replace_header(b"{'a':"), (FILE, "header", "not JSON")),
    "a header in a header in a header": Kind(
        replace_header(b'{"a":' * 50_000), (FILE, "header", "not JSON")
    ),
    "a header that is a list": Kind(replace_header(b"[]"), (FILE, "header", "object")),
    "a tensor twice": Kind(replace_header(b'{"a": 1, "a": 2}'), (FILE, "a is there twice")),
    "overlapping tensors": Kind(
        edit_header(overlap), (FILE, W2.replace("experts.3", "experts.2"), "overlaps")
    ),
    "a tensor beyond the end": Kind(
        edit_entry(data_offsets=[10**9, 10**9 + 4 * 12 * 10]), (FILE, W2, "ends at byte 1,000,")
    ),
    "a truncated file": Kind(
        edit_raw(FILE, lambda raw: raw[:-100]), (FILE, "truncated", "ends at byte")
    ),
    "bytes behind the last tensor": Kind(
        edit_raw(FILE, lambda raw: raw + b"12345678"), (FILE, "8 bytes", "no tensor")
    ),
    "a dtype that nobody knows": Kind(edit_entry(dtype="F7"), (FILE, W2, "'F7'", "BF16")),
    "a dtype that is no text": Kind(edit_entry(dtype=[1]), (FILE, W2, "dtype [1]")),
    "integers": Kind(edit_entry(dtype="I32"), (FILE, W2, "'I32'", "BF16")),
    "a negative size": Kind(edit_entry(shape=[-12, -10]), (FILE, W2, "shape [-12, -10]")),
    "a size that is no number": Kind(edit_entry(shape=["12", 10]), (FILE, W2, "shape ['12', 10]")),
    "a shape of another size": Kind(
        edit_entry(shape=[12, 11]), (FILE, W2, "528 bytes", "another length")
    ),
    "an enormous shape": Kind(edit_entry(shape=[2**62, 2**62]), (FILE, W2, "another length")),
    "offsets that are none": Kind(edit_entry(data_offsets=[0]), (FILE, W2, "data_offsets [0]")),
    "an entry with more in it": Kind(edit_entry(run="me"), (FILE, W2, "must have a dtype")),
    "a name of two lines": Kind(
        edit_header(lambda h: h.update({"a\nb": h.pop(W2)})), (FILE, r"'a\nb'", "printed")
    ),
}
FILES = {
    "a folder in the place of a file": Kind(be_a_folder, (FILE, "no regular file")),
    "a pipe in the place of a file": Kind(be_a_pipe, (FILE, "no regular file")),
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
    "names of nobody": Kind(edit_tensors(name_as_nobody), ("h.0.c_attn", "no layout")),
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
        edit_config(tie_word_embeddings=True), ("config.json", "tie_word_embeddings=True")
    ),
    "a sliding window": Kind(
        edit_config(sliding_window=4096), ("config.json", "sliding_window=4096")
    ),
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


# --- Shards with an index
# -----------------------------------------------------------------------------------------


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
        lambda folder: (folder / SHARD).unlink(), (INDEX, SHARD, "not there")
    ),
    "a shard that links outside": Kind(link_outside(SHARD), (SHARD, "symbolic link", "secret")),
    "a truncated shard": Kind(edit_raw(SHARD, lambda raw: raw[:-9]), (SHARD, "truncated")),
    "an index of a tensor that is not there": Kind(
        edit_index(lambda weight_map: weight_map.update(ghost=SHARD)),
        (INDEX, "ghost", "is not in", SHARD),
    ),
    "a tensor that the index leaves out": Kind(
        edit_index(lambda weight_map: weight_map.pop(W2)), (INDEX, W2, "unsaid")
    ),
}


@pytest.mark.parametrize("kind", [*HEADERS, *FILES, *ACCOUNTS, *CONFIGS])
def test_a_spoiled_file_is_refused(kind, folder):
    write_config(folder, SMALL)
    save_file(tensors_of(HUGGING_FACE, random_parameters(SMALL), SMALL), folder / FILE)
    check_refusal((HEADERS | FILES | ACCOUNTS | CONFIGS)[kind], folder)


@pytest.mark.parametrize("kind", INDICES)
def test_a_spoiled_index_is_refused(kind, folder):
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


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(folder):
    write_config(folder, SMALL)
    save_file(tensors_of(HUGGING_FACE, random_parameters(SMALL), SMALL), folder / FILE)
    weights = open_weights(folder)
    os.truncate(folder / FILE, (folder / FILE).stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated: it ends within"):
        read_all(weights)


def test_the_command_says_it_in_one_line_and_exits_2(folder):
    write_config(folder, SMALL)
    join_file(folder / FILE, b"{}", b"", 2**63)
    command = [sys.executable, "-m", "mixtral_jax", "import", f"--from={folder}", "--to=run"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {folder / FILE} is damaged")
    assert done.stderr.count("\n") == 1
    assert not Path("run").exists()
