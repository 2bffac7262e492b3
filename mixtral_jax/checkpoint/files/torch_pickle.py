"""Tensors of torch's `.pt` and `.pth` files, without torch.

Such a file is an uncompressed zip: a pickle that describes the tensors, which `tensor_pickle`
reads, and an entry of numbers for each storage.
"""

import dataclasses
import io
import struct
import zipfile
from pathlib import Path

from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.checkpoint.files.tensor_pickle import PickledTensor, read_tensors
from mixtral_jax.config import ConfigError, require

# The pickle of an eighth of Mixtral 8x22B has 0.1 MB.
_MAX_PICKLE = 20_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where the bytes of an entry of the zip lie in the file."""

    name: str
    offset: int
    num_bytes: int


def open_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; reads no numbers.

    Raises:
        ConfigError: the file is no dictionary of tensors, wants to do more than describe one, or is
            damaged.
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
            f"{path} is damaged, truncated, or a pickle of torch before 1.6, which is not read "
            f"({error}): save it as "
            "safetensors"
        ) from None


def _open_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, FileTensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    require(
        len(entries) == len(archive.infolist()),
        f"{path} is damaged: it has two entries of one name",
    )
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    require(
        len(pickles) == 1,
        f"{path} is no file of torch.save: it has {len(pickles)} entries data.pkl, not 1",
    )
    root = pickles[0].removesuffix("data.pkl")
    entry = entries[pickles[0]]
    require(
        entry.file_size <= _MAX_PICKLE,
        f"{path}: data.pkl has {entry.file_size:,} bytes: that is not believed",
    )
    for other in entries.values():
        require(
            other.compress_type == zipfile.ZIP_STORED, f"{path}: {other.filename} is compressed"
        )
        require(
            other.compress_size == other.file_size,
            f"{path}: {other.filename} is damaged: it has two sizes",
        )
    order = archive.read(root + "byteorder") if root + "byteorder" in entries else b"little"
    require(order == b"little", f"{path} has its numbers in the byte order {order!r}, not little")
    tensors = read_tensors(archive.read(pickles[0]), f"{path}: data.pkl")
    numbers = {
        name.removeprefix(root + "data/"): _locate(path, entry)
        for name, entry in entries.items()
        if name.startswith(root + "data/")
    }
    return {name: _find_numbers(path, name, tensor, numbers) for name, tensor in tensors.items()}


def _locate(path: Path, entry: zipfile.ZipInfo) -> _Entry:
    """Where the bytes of an entry begin, which only the header before them says."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    is_header = len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\3\4")
    require(is_header, f"{path}: {entry.filename} is damaged: it is not where the zip says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    require(
        offset + entry.file_size <= size, f"{path} is truncated: it ends within {entry.filename}"
    )
    return _Entry(entry.filename, offset, entry.file_size)


def _find_numbers(
    path: Path, name: str, tensor: PickledTensor, numbers: dict[str, _Entry]
) -> FileTensor:
    storage, where = tensor.storage, f"{path}: tensor {name}"
    dtype = DTYPES[storage.dtype]
    require(
        storage.key in numbers, f"{where} is in storage {storage.key!r}, which is not in the file"
    )
    entry = numbers[storage.key]
    require(
        entry.num_bytes == storage.num_numbers * dtype.itemsize,
        f"{where} is in {entry.name}, which has {entry.num_bytes:,} bytes, but "
        f"{storage.num_numbers:,} numbers of "
        f"{dtype.name} need {storage.num_numbers * dtype.itemsize:,}",
    )
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    require(
        0 in tensor.shape or tensor.start + last < storage.num_numbers,
        f"{where} of shape {tensor.shape} reaches out of its storage, {entry.name}",
    )
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return FileTensor(
        path, name, dtype, entry.offset + tensor.start * dtype.itemsize, tensor.shape, strides
    )
