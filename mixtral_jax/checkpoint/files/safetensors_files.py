"""Safetensors files, read and written a tensor at a time.

Format: 8 bytes with the length of a header, the header, the numbers. The header is JSON: for each
tensor its dtype, shape and bytes. It comes with the file, so nothing in it is believed before it is
checked. The safetensors package checks much of this too; but it maps whole files or holds whole
tensors, and its errors name no tensor. Source: https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.foreign_folder import find_file, parse_object, read_object
from mixtral_jax.checkpoint.files.stored import DTYPES, StoredArray, write_numbers
from mixtral_jax.config import ConfigError, require

# The limit of the safetensors package.
_MAX_HEADER = 100_000_000
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPES = {name: DTYPES[ours] for name, ours in _DTYPE_NAMES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Of the numbers' first byte: so that they can be mapped into memory.
_ALIGNMENT = 8


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; reads the header alone.

    Raises:
        ConfigError: the file is damaged, or holds what weights do not; names the tensor.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            require(size >= 8, f"{path} is truncated: it has {size} bytes, and no header")
            require(
                length <= min(size - 8, _MAX_HEADER),
                f"{path} is damaged or truncated: its header is said to have {length:,} bytes, the "
                f"file has {size:,}",
            )
            header = parse_object(file.read(length), f"the header of {path}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _read_entry(path, name, entry, start) for name, entry in header.items()}
    _check_tiling(path, list(tensors.values()), start, size)
    return tensors


def open_shards(folder: Path, index: Path) -> dict[str, FileTensor]:
    """The tensors of all files that an index names.

    Raises:
        ConfigError: a file or a tensor of the index is not there, or a tensor is there that the
            index does not name.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ConfigError(f"{index} must have a weight_map from tensors to files")
    tensors: dict[str, FileTensor] = {}
    wrong = []
    for name, first in {name: tensor for tensor, name in reversed(weight_map.items())}.items():
        said = f"{index}: tensor {first!r}"
        path = find_file(folder, name, said)
        require(
            name.endswith(".safetensors"),
            f"{said} is in {name!r}, it says: that is no .safetensors file",
        )
        if path is None:
            raise ConfigError(f"{said} is in {name!r}, it says: that is not there")
        here = open_file(path)
        wrong += [
            f"{tensor} is in {name}, unsaid" for tensor in here if weight_map.get(tensor) != name
        ]
        tensors |= here
    wrong += [
        f"{tensor!r} is not in {name}"
        for tensor, name in weight_map.items()
        if tensor not in tensors
    ]
    require(not wrong, f"{index} does not fit its files: {'; '.join(wrong)}")
    return tensors


def _read_entry(path: Path, name: str, entry: Any, start: int) -> FileTensor:
    where = f"{path}: tensor {name}"
    require(name.isprintable(), f"{path}: the name {name!r} of a tensor cannot be printed")
    require(
        isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
        f"{where} must have a dtype, a shape and data_offsets",
    )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(
        isinstance(dtype, str) and dtype in _DTYPES,
        f"{where} has dtype {dtype!r}; weights here have {', '.join(_DTYPES)}",
    )
    require(_are_sizes(shape), f"{where} has shape {shape!r}")
    require(_are_sizes(offsets) and len(offsets) == 2, f"{where} has data_offsets {offsets!r}")
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    require(
        offsets[1] - offsets[0] == num_bytes,
        f"{where} needs {num_bytes:,} bytes for shape {shape}, but data_offsets {offsets} have "
        "another length",
    )
    return FileTensor.in_rows(path, name, _DTYPES[dtype], start + offsets[0], tuple(shape))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _check_tiling(path: Path, tensors: list[FileTensor], start: int, size: int) -> None:
    """Makes sure that the tensors follow each other up to the end of the file."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
    for tensor in ordered:
        require(
            tensor.offset + tensor.nbytes <= size,
            f"{path} is truncated or damaged: tensor {tensor.name} ends at byte "
            f"{tensor.offset + tensor.nbytes:,} of "
            f"{size:,}",
        )
    end, last = start, "the header"
    for tensor in ordered:
        how = "overlaps" if tensor.offset < end else "leaves a gap after"
        require(tensor.offset == end, f"{path} is damaged: tensor {tensor.name} {how} {last}")
        end, last = tensor.offset + tensor.nbytes, tensor.name
    require(end == size, f"{path} is damaged: {size - end:,} bytes after {last} are of no tensor")


class FileWriter:
    """Writes a file whose tensors are known by shape; each is put in its place when it is there, by
    any thread.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredArray]):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._starts, end = {}, 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            self._starts[name] = start
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [start, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._data = os.pwrite(self._descriptor, len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Puts a tensor in its place."""
        write_numbers(self._descriptor, tensor, self._data + self._starts[name])

    def close(self) -> None:
        """Ends writing."""
        os.close(self._descriptor)
