"""Ways to damage a folder of weights, and a check that it is refused.

The refusal must be clear and quick, and must write nothing.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE
from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ConfigError
from tests.checkpoint.folders import SMALL, random_parameters, tensors_of, write_config

FILE = "model.safetensors"
# A tensor in it.
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"

Spoil = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of damage, and the words that the error message must contain."""

    spoil: Spoil
    words: tuple[str, ...]


def write_raw(name: str, raw: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(raw)


def edit_raw(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def link_outside(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        outside = folder.parent / "secret"
        outside.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to("../secret")

    return spoil


@functools.cache
def _good_file() -> bytes:
    return save(tensors_of(HUGGING_FACE, random_parameters(SMALL), SMALL))


def write_good_folder(folder: Path) -> None:
    """Writes a folder of Hugging Face without damage."""
    write_config(folder, SMALL)
    (folder / FILE).write_bytes(_good_file())


def check_refusal(kind: Kind, folder: Path) -> None:
    """Damages a folder, and checks that importing it fails as described at the top."""
    kind.spoil(folder)
    before = sorted(folder.parent.rglob("*"))
    start = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        run_verb(["import", f"--from={folder}", "--to=run"])
    assert time.monotonic() - start < 5
    message = str(raised.value)
    assert message.isprintable(), message
    for word in kind.words:
        assert word in message
    assert sorted(folder.parent.rglob("*")) == before
