"""Safetensors files that are damaged or hostile are refused with one line that names the damage."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from tests.checkpoint.folders import SMALL, read_all, write_config
from tests.checkpoint.refusals import (
    FILE,
    W2,
    Kind,
    Spoil,
    check_refusal,
    edit_raw,
    write_good_folder,
    write_raw,
)

ROOT = str(Path(__file__).parents[2])


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and its numbers."""
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


def replace_header(text: bytes, length: int | None = None) -> Spoil:
    return lambda folder: join_file(folder / FILE, text, b"", length)


def overlap(header: dict[str, Any]) -> None:
    """Puts one tensor where another of the same size is."""
    header[W2]["data_offsets"] = header[W2.replace("experts.3", "experts.2")]["data_offsets"]


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


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_file_is_refused(kind, folder):
    write_good_folder(folder)
    check_refusal(HEADERS[kind], folder)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(folder):
    write_good_folder(folder)
    weights = open_weights(folder)
    os.truncate(folder / FILE, (folder / FILE).stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated: it ends within"):
        read_all(weights)


def test_the_command_prints_one_line_and_exits_2(folder):
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
