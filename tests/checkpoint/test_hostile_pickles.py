"""Files of torch and params.json that are damaged or hostile are refused, and never run."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mixtral_jax.checkpoint.formats.layouts import MISTRAL
from mixtral_jax.checkpoint.weights import open_weights
from tests.checkpoint.folders import SMALL, random_parameters, tensors_of, write_params, write_torch
from tests.checkpoint.refusals import Kind, Spoil, check_refusal, edit_raw, write_raw


class Run:
    """An object that makes a call when it is unpickled."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def write_pickle(instructions: bytes, **entries: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
            archive.writestr("archive/data.pkl", instructions)
            for name, raw in entries.items():
                archive.writestr("archive/" + name.replace("__", "/"), raw)

    return spoil


def rewrite_zip(
    change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "consolidated.00.pth"
        with zipfile.ZipFile(path) as archive:
            entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, raw in entries.items():
                if raw is not None:
                    archive.writestr(name, raw)

    return spoil


def save_again(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors: dict[str, Any] = tensors_of(MISTRAL, random_parameters(SMALL), SMALL)
        write_torch(folder / "consolidated.00.pth", change(tensors))

    return spoil


def pickled(value: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    pickle.Pickler(file, protocol).dump(value)
    return file.getvalue()


def nested_tuples() -> bytes:
    """A pickle of 60 nested tuples; comparing two such values takes 2**60 steps."""
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    return pickled(value)[2:-1]


PTH = "consolidated.00.pth"
WQ = "layers.0.attention.wq.weight"
PICKLES = {
    "a pickle that runs a command": Kind(
        write_pickle(pickled({"a": Run(os.system, "touch executed")})),
        (PTH, "posix.system", "refused"),
    ),
    "a pickle that evaluates text": Kind(
        write_pickle(pickled({"a": Run(eval, "open('executed', 'w')")}, 4)),
        (PTH, "builtins.eval", "refused"),
    ),
    "a pickle that imports": Kind(
        write_pickle(pickled({"a": Run(__import__, "antigravity")})), (PTH, "__import__", "refused")
    ),
    "a pickle with an old instruction": Kind(
        write_pickle(b"(S'touch executed'\nios\nsystem\n."), (PTH, "instruction STRING")
    ),
    "a pickle that asks for an object by name": Kind(
        write_pickle(b"cbuiltins\ngetattr\n."), (PTH, "builtins.getattr")
    ),
    "a pickle of an enormous memory": Kind(
        write_pickle(b"\x80\x02]r\xff\xff\xff\x7f."), (PTH, "holds a list")
    ),
    "a pickle whose key takes for ever to look up": Kind(
        write_pickle(b"\x80\x02}" + nested_tuples() + b"K\x01s."), (PTH, "keys that are text")
    ),
    "a pickle that breaks off": Kind(
        write_pickle(pickled({"a": 1})[:-3]), (PTH, "data.pkl is damaged")
    ),
    "a pickle of something else": Kind(write_pickle(pickled([1])), (PTH, "list", "dictionary")),
    "a pickle of numbers": Kind(write_pickle(pickled({"a": 1})), (PTH, "a is of type int")),
    "a pickle in a pickle": Kind(
        save_again(lambda tensors: {"model": tensors}), (PTH, "model is of type dict")
    ),
    "a zip without a pickle": Kind(
        rewrite_zip(lambda name, raw: None if name.endswith("pkl") else raw), (PTH, "data.pkl")
    ),
    "a storage that is not there": Kind(
        rewrite_zip(lambda name, raw: None if name.endswith("data/3") else raw),
        (PTH, "storage '3'", "not in the file"),
    ),
    "a storage that is too short": Kind(
        rewrite_zip(lambda name, raw: raw[:-4] if name.endswith("data/3") else raw),
        (PTH, "data/3", "need"),
    ),
    "compressed numbers": Kind(
        rewrite_zip(lambda _, raw: raw, zipfile.ZIP_DEFLATED), (PTH, "is compressed")
    ),
    "numbers the other way round": Kind(
        rewrite_zip(lambda name, raw: b"big" if name.endswith("byteorder") else raw),
        (PTH, "byte order"),
    ),
    "a truncated zip": Kind(edit_raw(PTH, lambda raw: raw[: len(raw) // 2]), (PTH, "truncated")),
    "a pickle of torch before 1.6": Kind(write_raw(PTH, pickled({"a": 1})), (PTH, "before 1.6")),
    "a tensor that reaches out of its storage": Kind(
        rewrite_zip(
            lambda name, raw: (
                raw.replace(b"K\x18K\x0c\x86", b"K\x18K\x0d\x86") if name.endswith("pkl") else raw
            )
        ),
        (PTH, WQ, "reaches beyond"),
    ),
    "a file of eight that is missing": Kind(
        lambda folder: (folder / PTH).rename(folder / "consolidated.01.pth"),
        ("consolidated.01.pth", "one is missing"),
    ),
    "a tensor in two files": Kind(
        lambda folder: (folder / "consolidated.01.pth").write_bytes((folder / PTH).read_bytes()),
        ("consolidated.01.pth", WQ, "in another file too"),
    ),
    "weights twice": Kind(
        lambda folder: save_file(
            {"a": np.zeros(1, np.float32)}, folder / "consolidated.safetensors"
        ),
        ("has both consolidated.safetensors and", PTH),
    ),
    "params with a key of another model": Kind(
        lambda folder: write_params(folder, SMALL, vision_encoder={}),
        ("params.json", "vision_encoder"),
    ),
    "params without experts": Kind(
        lambda folder: write_params(folder, SMALL, moe=None), ("params.json", "moe=None")
    ),
    "params with a window": Kind(
        lambda folder: write_params(folder, SMALL, sliding_window=4096),
        ("params.json", "sliding_window=4096"),
    ),
    "params that are text": Kind(
        lambda folder: write_params(folder, SMALL, dim="12"), ("params.json", "'12'", "number")
    ),
    "params with another base of positions": Kind(
        lambda folder: write_params(folder, SMALL, rope_theta=[1]),
        ("params.json", "rope_theta=[1]"),
    ),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_spoiled_file_of_torch_is_refused_and_runs_nothing(kind, folder):
    write_params(folder, SMALL)
    write_torch(folder / PTH, tensors_of(MISTRAL, random_parameters(SMALL), SMALL))
    open_weights(folder)  # Still undamaged.
    check_refusal(PICKLES[kind], folder)
