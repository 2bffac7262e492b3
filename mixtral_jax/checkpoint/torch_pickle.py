"""Tensors of torch's `.pt` and `.pth` files, without torch, and without running anything that they say.

Such a file is an uncompressed zip: a pickle that describes the tensors, and a file of numbers for each storage. The
pickle is a program; it is read twice. First its instructions are looked through, and any but the few that a
dictionary of tensors needs are refused; then it runs, with the four names below and no others, none of which is
code of the file or of torch.
"""

import collections
import dataclasses
import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoint.file_tensor import FileTensor
from mixtral_jax.checkpoint.stored import DTYPES
from mixtral_jax.config import ConfigError, require

# The pickle of an eighth of Mixtral 8x22B has 0.1 MB.
_MAX_PICKLE = 50_000_000
_INSTRUCTIONS = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE", "SETITEM", "SETITEMS", "APPEND", "APPENDS",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE",
))  # fmt: skip
_STORAGES = {
    ("torch", "FloatStorage"): DTYPES["float32"],
    ("torch", "BFloat16Storage"): DTYPES["bfloat16"],
    ("torch", "HalfStorage"): DTYPES["float16"],
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclasses.dataclass(frozen=True)
class _Storage:
    name: str
    dtype: np.dtype
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; reads no numbers.

    Raises:
        ConfigError: the file is no dictionary of tensors, wants to do more than describe one, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _open_archive(path, archive)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # zipfile raises anything.
        raise ConfigError(
            f"{path} is damaged, truncated, or a pickle of torch before 1.6, which is not read ({error}): save it as "
            "safetensors"
        ) from None


def _open_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, FileTensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    require(len(entries) == len(archive.infolist()), f"{path} is damaged: it has two entries of one name")
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    require(len(pickles) == 1, f"{path} is no file of torch.save: it has {len(pickles)} entries data.pkl, not 1")
    root = pickles[0].removesuffix("data.pkl")
    entry = entries[pickles[0]]
    require(entry.file_size <= _MAX_PICKLE, f"{path}: data.pkl has {entry.file_size:,} bytes: that is not believed")
    for other in entries.values():
        require(other.compress_type == zipfile.ZIP_STORED, f"{path}: {other.filename} is compressed")
        require(other.compress_size == other.file_size, f"{path}: {other.filename} is damaged: it has two sizes")
    order = archive.read(root + "byteorder") if root + "byteorder" in entries else b"little"
    require(order == b"little", f"{path} has its numbers in the byte order {order!r}, not little")
    instructions = archive.read(pickles[0])
    _check_instructions(path, instructions)
    storages = {
        name.removeprefix(root + "data/"): _locate(path, archive, entry)
        for name, entry in entries.items()
        if name.startswith(root + "data/")
    }
    try:
        found = _TensorUnpickler(path, instructions, storages).load()
        require(isinstance(found, dict), f"{path} holds {type(found).__name__}, not a dictionary of tensors")
        return {name: _as_file_tensor(path, name, tensor) for name, tensor in found.items()}
    except ConfigError:
        raise
    except Exception as error:  # Unpickling raises anything.
        raise ConfigError(f"{path}: data.pkl is damaged: {type(error).__name__}: {error}") from None


def _check_instructions(path: Path, instructions: bytes) -> None:
    num_bytes = 0
    try:
        for opcode, argument, position in pickletools.genops(instructions):
            where = f"{path}: data.pkl at byte {position}"
            require(opcode.name in _INSTRUCTIONS, f"{where} has the instruction {opcode.name}, which no tensor needs")
            # The size of a table that is made at once.
            is_sparse = opcode.name.endswith("BINPUT") and int(argument or 0) > (position or 0)
            require(not is_sparse, f"{where} puts something into place {argument} of its memory, which is too far")
            num_bytes = position or 0
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: data.pkl is damaged after byte {num_bytes}: {error}") from None


def _locate(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Storage:
    """Where the bytes of an entry begin, which only the header before them says."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    is_header = len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\3\4")
    require(is_header, f"{path}: {entry.filename} is damaged: it is not where the zip says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    require(offset + entry.file_size <= size, f"{path} is truncated: it ends within {entry.filename}")
    return _Storage(entry.filename, np.dtype(np.uint8), offset, entry.file_size)


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors, storages and ordered dictionaries, and no other name."""

    def __init__(self, path: Path, instructions: bytes, storages: dict[str, _Storage]):
        super().__init__(io.BytesIO(instructions))
        self._path = path
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _STORAGES[module, name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        raise ConfigError(
            f"{self._path}: data.pkl asks for {module}.{name}, which is refused: only tensors and storages are read"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, num_numbers = pid
        where = f"{self._path}: storage {key!r}"
        require(kind == "storage" and isinstance(dtype, np.dtype), f"{where} is no storage of known numbers")
        require(key in self._storages, f"{where} is not in the file")
        storage = dataclasses.replace(self._storages[key], dtype=dtype)
        needed = num_numbers * dtype.itemsize
        require(
            storage.num_bytes == needed,
            f"{where} has {storage.num_bytes:,} bytes, but {num_numbers:,} numbers of {dtype.name} need {needed:,}",
        )
        return storage


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, start, shape, strides)


def _as_file_tensor(path: Path, name: Any, tensor: Any) -> FileTensor:
    require(isinstance(name, str) and name.isprintable(), f"{path} holds something named {name!r}")
    require(isinstance(tensor, _Tensor), f"{path}: {name} is of type {type(tensor).__name__}, not a tensor")
    storage, numbers = tensor.storage, (tensor.start, *tensor.shape, *tensor.strides)
    require(
        isinstance(storage, _Storage)
        and all(type(number) is int and number >= 0 for number in numbers)
        and len(tensor.shape) == len(tensor.strides),
        f"{path}: tensor {name} is described by what cannot be",
    )
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    end = (tensor.start + last + 1) * storage.dtype.itemsize
    require(
        0 in tensor.shape or end <= storage.num_bytes,
        f"{path}: tensor {name} of shape {tensor.shape} reaches out of its storage, {storage.name}",
    )
    itemsize = storage.dtype.itemsize
    strides = tuple(stride * itemsize for stride in tensor.strides)
    return FileTensor(path, name, storage.dtype, storage.offset + tensor.start * itemsize, tensor.shape, strides)
