"""Writes and reads arrays as uncompressed chunk files of zarr.

Several processes, each with several threads, can write a share of the chunks each. An uncompressed
chunk is a file that holds only the numbers, named after the chunk's position
(https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html). Writing them through tensorstore took
several times as long, since it copies the numbers first and waits for the disk. A chunk keeps the
memory order of the tensor that it comes from if zarr has a name for that order: so a matrix of
Hugging Face or Mistral, which is the transpose of ours, is copied as it is. This module does not
import jax, which takes as long to start as copying a gigabyte.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorstore

from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.checkpoint.files.stored import (
    DTYPES,
    Block,
    Order,
    StoredArray,
    blocks_of,
    run_jobs,
    scratch,
    shape_of,
    write_numbers,
)

# Entries of `.zarray` that mark an array as uncompressed chunks.
_UNCOMPRESSED = {"zarr_format": 2, "compressor": None, "filters": None, "dimension_separator": "."}
_DTYPES = {"<f4": DTYPES["float32"], "<f2": DTYPES["float16"], "bfloat16": DTYPES["bfloat16"]}


def write_chunks(
    folder: Path, arrays: Mapping[str, StoredArray], index: int, count: int
) -> Generator[int]:
    """Writes each array into the subfolder of its name; yields the size of each written chunk.

    This process writes the share with number `index`, if `count` processes call it with the same
    arrays.

    Raises:
        ConfigError: a file that is read is damaged.
        OSError: a file cannot be written.
    """
    for name, stored in arrays.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if index == 0:
            _describe(folder / name, stored)
    # The largest chunks go first, so that all threads end at about the same time.
    ordered = sorted(arrays.items(), key=lambda item: -math.prod(item[1].chunk))
    jobs = (
        functools.partial(_write_chunk, folder / name, stored, block)
        for name, stored in ordered
        for block in blocks_of(stored.shape, stored.chunk)
    )
    return run_jobs(itertools.islice(jobs, index, None, count))


def open_chunks(folder: Path, name: str) -> StoredArray | None:
    """The array in a folder that `write_chunks` has written; None for other formats of zarr.

    `name` is shown in error messages.

    Raises:
        ConfigError: the folder has no readable description of an array.
    """
    described = read_object(folder / ".zarray")
    is_uncompressed = {key: described.get(key) for key in _UNCOMPRESSED} == _UNCOMPRESSED
    if not is_uncompressed or described.get("dtype") not in _DTYPES:
        return None
    order: Order = "F" if described.get("order") == "F" else "C"
    shape, chunk = tuple(described["shape"]), tuple(described["chunks"])
    dtype = _DTYPES[described["dtype"]]
    read_into = functools.partial(_read_chunks, folder, chunk, dtype, order)
    return StoredArray(shape, dtype, chunk, read_into, name, order)


def _read_chunks(
    folder: Path,
    chunk: tuple[int, ...],
    dtype: np.dtype,
    order: Order,
    block: Block,
    target: np.ndarray,
) -> None:
    """Reads the part of each chunk that overlaps the block."""
    whole_chunk = FileTensor.in_order(folder, "the chunk", dtype, 0, chunk, order)
    overlapping = [
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(block, chunk, strict=True)
    ]
    for place in itertools.product(*overlapping):
        in_block, in_chunk = [], []
        for part, number, size in zip(block, place, chunk, strict=True):
            corner = number * size
            start, stop = max(part.start, corner), min(part.stop, corner + size)
            in_block.append(slice(start - part.start, stop - part.start))
            in_chunk.append(range(start - corner, stop - corner))
        source = dataclasses.replace(whole_chunk, path=folder / _file_name(place))
        source.cut(in_chunk).read_into(target[tuple(in_block)])


def _file_name(place: Iterable[int]) -> str:
    return ".".join(map(str, place))


def _describe(folder: Path, stored: StoredArray) -> None:
    """Writes the `.zarray` file that describes the chunks of an array."""
    order = stored.order or "C"
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "dtype": stored.dtype.name,
        "metadata": {
            "shape": stored.shape,
            "chunks": stored.chunk,
            "order": order,
            "compressor": None,
        },
    }
    # No sync: the operating system decides when to write to the disk, as for any copy of a file.
    context = tensorstore.Context({"file_io_sync": False})
    tensorstore.open(spec, create=True, context=context).result()


def _write_chunk(folder: Path, stored: StoredArray, block: Block) -> int:
    place, done = (part.start // size for part, size in zip(block, stored.chunk, strict=True)), 0
    with open(folder / _file_name(place), "xb", buffering=0) as file:
        for part in stored.parts_of(block):
            numbers = scratch("chunk", shape_of(part), stored.dtype, stored.order)
            stored.read_into(part, numbers)
            write_numbers(file.fileno(), numbers, done)
            done += numbers.nbytes
    return done
