"""Ways to spoil a folder of weights, and to see that it is refused: clearly, soon, and with nothing
written.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ConfigError

Spoil = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is wrong, and what must be said of it."""

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


def check_refusal(kind: Kind, folder: Path) -> None:
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
