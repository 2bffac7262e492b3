"""Reads and writes safetensors files, one tensor at a time.

Format: 8 bytes with the length of the header, the header, the numbers. The header is JSON, with
the dtype, shape and byte range of each tensor. A file may be hostile, so all of its header is
checked before any of it is used. The safetensors package checks much of this too, but it maps
whole files or holds whole tensors in memory, and its errors do not name the tensor. Source:
https://huggingface.co/docs/safetensors.
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
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPES = {name: DTYPES[ours] for name, ours in _DTYPE_NAMES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The numbers begin at a multiple of this, so that other programs can map them into memory.
_ALIGNMENT_BYTES = 8


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; reads only the header.

    Raises:
        ConfigError: the file is damaged, or has a tensor that weights cannot have; names it.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            require(
                size >= 8,
                f"{path} is truncated: it has {size} bytes, and a header alone has more; copy it "
                "again",
            )
            require(
                length <= min(size - 8, _MAX_HEADER_BYTES),
                f"{path} is damaged or truncated: it gives its header a length of {length:,} "
                f"bytes, which must fit into the {size:,} bytes of the file and below "
                f"{_MAX_HEADER_BYTES:,}; copy it again",
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
        ConfigError: a file or a tensor in the index does not exist, or a file has a tensor that
            the index assigns to another file or to none.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ConfigError(
            f"{index} must have a weight_map, an object from names of tensors to names of files: "
            "copy it again"
        )
    tensors: dict[str, FileTensor] = {}
    wrong = []
    first_tensors = {name: tensor for tensor, name in reversed(weight_map.items())}
    for name, first_tensor in first_tensors.items():
        entry = f"{index}: the entry of tensor {first_tensor!r}"
        path = find_file(folder, name, entry)
        require(
            name.endswith(".safetensors"),
            f"{entry} names the file {name!r}, which is not a .safetensors file: convert the "
            "weights to safetensors",
        )
        if path is None:
            raise ConfigError(
                f"{entry} names the file {name!r}, which is not in the folder: copy it there"
            )
        found = open_file(path)
        wrong += [
            f"{tensor} is in {name}, which the index does not say"
            for tensor in found
            if weight_map.get(tensor) != name
        ]
        tensors |= found
    wrong += [
        f"{tensor!r} is not in {name}"
        for tensor, name in weight_map.items()
        if tensor not in tensors
    ]
    require(
        not wrong,
        f"{index} does not fit its files: {'; '.join(wrong)}; copy all files of one model again",
    )
    return tensors


def _read_entry(path: Path, name: str, entry: Any, start: int) -> FileTensor:
    where = f"{path}: tensor {name}"
    fix = "save the weights again"
    require(
        name.isprintable(),
        f"{path}: the name {name!r} of a tensor must consist of characters that can be printed: "
        f"{fix}",
    )
    require(
        isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
        f"{where} must have a dtype, a shape and data_offsets, and nothing else: {fix}",
    )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(
        isinstance(dtype, str) and dtype in _DTYPES,
        f"{where} has dtype {dtype!r}, which must be one of {', '.join(_DTYPES)}: {fix} in one of "
        "these",
    )
    require(
        _are_sizes(shape),
        f"{where} has shape {shape!r}, which must be a list of whole numbers from 0 up: {fix}",
    )
    require(
        _are_sizes(offsets) and len(offsets) == 2,
        f"{where} has data_offsets {offsets!r}, which must be two whole numbers from 0 up: {fix}",
    )
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    require(
        offsets[1] - offsets[0] == num_bytes,
        f"{where} needs {num_bytes:,} bytes for shape {shape}, but data_offsets {offsets} have "
        f"another length: {fix}",
    )
    return FileTensor.in_rows(path, name, _DTYPES[dtype], start + offsets[0], tuple(shape))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _check_tiling(path: Path, tensors: list[FileTensor], start: int, size: int) -> None:
    """Checks that the tensors follow each other without gaps, up to the end of the file."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
    for tensor in ordered:
        require(
            tensor.offset + tensor.nbytes <= size,
            f"{path} is truncated or damaged: tensor {tensor.name} ends at byte "
            f"{tensor.offset + tensor.nbytes:,}, but the file has {size:,} bytes; copy it again",
        )
    end, last = start, "the header"
    for tensor in ordered:
        how = "overlaps" if tensor.offset < end else "leaves a gap after"
        require(
            tensor.offset == end,
            f"{path} is damaged: tensor {tensor.name} {how} {last}; save the weights again",
        )
        end, last = tensor.offset + tensor.nbytes, tensor.name
    require(
        end == size,
        f"{path} is damaged: {size - end:,} bytes after {last} belong to no tensor; save the "
        "weights again",
    )


class FileWriter:
    """Writes a file whose tensors are known by name, shape and dtype.

    The constructor writes the header. Threads may then write the tensors in any order.
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
        header += b" " * (-len(header) % _ALIGNMENT_BYTES)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._data = os.pwrite(self._descriptor, len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes a tensor to its place in the file."""
        write_numbers(self._descriptor, tensor, self._data + self._starts[name])

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
