"""Reads the tensors of torch's `.pt` and `.pth` files, without torch.

Such a file is an uncompressed zip archive. It has a pickle that describes the tensors, which
`safe_unpickler` reads without running it, and one entry of numbers per storage.
"""

import dataclasses
import io
import struct
import zipfile
from pathlib import Path

from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.safe_unpickler import PickledTensor, read_tensors
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.config import ConfigError, require

# The pickle in one of the eight files of Mixtral 8x22B has 0.1 MB.
_MAX_PICKLE_BYTES = 20_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_FIX = "copy it again, or save it again with torch.save"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where the bytes of a zip entry are in the file."""

    name: str
    offset: int
    num_bytes: int


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; reads no numbers.

    Raises:
        ConfigError: the file is damaged, is not a dictionary of tensors, or asks for more than
            that.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _open_archive(path, archive)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # zipfile raises many types of exceptions.
        raise ConfigError(
            f"{path} is damaged, truncated, or saved by torch before 1.6, which is not supported "
            f"({error}): copy it again, or save it as safetensors"
        ) from None


def _open_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, FileTensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    require(
        len(entries) == len(archive.infolist()),
        f"{path} is damaged: two of its entries have the same name; {_FIX}",
    )
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    require(
        len(pickles) == 1,
        f"{path} was not written by torch.save: it has {len(pickles)} entries data.pkl, not 1; "
        f"{_FIX}",
    )
    root = pickles[0].removesuffix("data.pkl")
    entry = entries[pickles[0]]
    require(
        entry.file_size <= _MAX_PICKLE_BYTES,
        f"{path}: data.pkl has {entry.file_size:,} bytes, and at most {_MAX_PICKLE_BYTES:,} are "
        f"read; {_FIX}",
    )
    for other in entries.values():
        require(
            other.compress_type == zipfile.ZIP_STORED,
            f"{path}: {other.filename} is compressed, which torch.save never does; {_FIX}",
        )
        require(
            other.compress_size == other.file_size,
            f"{path}: {other.filename} is damaged: its two sizes differ; {_FIX}",
        )
    order = archive.read(root + "byteorder") if root + "byteorder" in entries else b"little"
    require(
        order == b"little",
        f"{path} has its numbers in the byte order {order!r}, which must be little; {_FIX} on a "
        "little-endian machine",
    )
    tensors = read_tensors(archive.read(pickles[0]), f"{path}: data.pkl")
    numbers = {
        name.removeprefix(root + "data/"): _locate(path, entry)
        for name, entry in entries.items()
        if name.startswith(root + "data/")
    }
    return {name: _find_numbers(path, name, tensor, numbers) for name, tensor in tensors.items()}


def _locate(path: Path, entry: zipfile.ZipInfo) -> _Entry:
    """Finds where the bytes of an entry begin, which depends on the header before them."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    is_header = len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\3\4")
    require(
        is_header,
        f"{path}: {entry.filename} is damaged: it is not where the zip directory says; copy the "
        "file again",
    )
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    require(
        offset + entry.file_size <= size,
        f"{path} is truncated: it ends within {entry.filename}; copy it again",
    )
    return _Entry(entry.filename, offset, entry.file_size)


def _find_numbers(
    path: Path, name: str, tensor: PickledTensor, numbers: dict[str, _Entry]
) -> FileTensor:
    storage, where = tensor.storage, f"{path}: tensor {name}"
    dtype = DTYPES[storage.dtype]
    require(
        storage.key in numbers,
        f"{where} is in storage {storage.key!r}, which is not in the file; {_FIX}",
    )
    entry = numbers[storage.key]
    require(
        entry.num_bytes == storage.num_numbers * dtype.itemsize,
        f"{where} is in {entry.name}, which has {entry.num_bytes:,} bytes, but "
        f"{storage.num_numbers:,} numbers of {dtype.name} need "
        f"{storage.num_numbers * dtype.itemsize:,}; {_FIX}",
    )
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    require(
        0 in tensor.shape or tensor.start + last < storage.num_numbers,
        f"{where} of shape {tensor.shape} reaches beyond its storage, {entry.name}; {_FIX}",
    )
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return FileTensor(
        path, name, dtype, entry.offset + tensor.start * dtype.itemsize, tensor.shape, strides
    )
