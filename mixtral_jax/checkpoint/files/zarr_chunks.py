"""Arrays as chunk files of zarr: copied into them by threads and by processes, each its share, and
read from them.

A chunk that is not compressed is its numbers and nothing else, in a file named after its place
(https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html). tensorstore would copy the numbers
first, and wait for the disk: that took several times as long. A chunk keeps the order of the tensor
that it comes from where zarr can name it: a matrix of Hugging Face or Mistral, whose rows are our
columns, is copied and not transposed. Knows no jax, which takes as long to start as a gigabyte to
copy.
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

# Of what is not compressed.
_PLAIN = {"zarr_format": 2, "compressor": None, "filters": None, "dimension_separator": "."}
_DTYPES = {"<f4": DTYPES["float32"], "<f2": DTYPES["float16"], "bfloat16": DTYPES["bfloat16"]}


def write_chunks(
    folder: Path, arrays: Mapping[str, StoredArray], index: int = 0, count: int = 1
) -> Generator[int]:
    """Writes every array into the folder of its name; gives the bytes of each chunk as it is done.

    Of `count` processes that are given the same, this is number `index`.

    Raises:
        ConfigError: a file that is read is damaged.
        OSError: a file cannot be written.
    """
    for name, stored in arrays.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if index == 0:
            _describe(folder / name, stored)
    # The largest first, so that threads end together.
    ordered = sorted(arrays.items(), key=lambda item: -math.prod(item[1].chunk))
    jobs = (
        functools.partial(_write_chunk, folder / name, stored, block)
        for name, stored in ordered
        for block in blocks_of(stored.shape, stored.chunk)
    )
    return run_jobs(itertools.islice(jobs, index, None, count))


def open_chunks(folder: Path, name: str) -> StoredArray | None:
    """The array in a folder that `write_chunks` has written, or None if it is of another kind;
    `name` is for people.

    Raises:
        ConfigError: nothing is there, or it does not say what it is.
    """
    described = read_object(folder / ".zarray")
    if {key: described.get(key) for key in _PLAIN} != _PLAIN or described.get(
        "dtype"
    ) not in _DTYPES:
        return None
    order: Order = "F" if described.get("order") == "F" else "C"
    shape, chunk, dtype = (
        tuple(described["shape"]),
        tuple(described["chunks"]),
        _DTYPES[described["dtype"]],
    )
    return StoredArray(
        shape,
        dtype,
        chunk,
        functools.partial(_read_chunks, folder, chunk, dtype, order),
        name,
        order,
    )


def _read_chunks(
    folder: Path,
    chunk: tuple[int, ...],
    dtype: np.dtype,
    order: Order,
    block: Block,
    target: np.ndarray,
) -> None:
    """Reads what a block has of every chunk that it touches."""
    whole = FileTensor.in_order(folder, "the chunk", dtype, 0, chunk, order)
    touched = [
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(block, chunk, strict=True)
    ]
    for place in itertools.product(*touched):
        corner = [number * size for number, size in zip(place, chunk, strict=True)]
        starts = [max(part.start, first) for part, first in zip(block, corner, strict=True)]
        stops = [
            min(part.stop, first + size)
            for part, first, size in zip(block, corner, chunk, strict=True)
        ]
        here = tuple(
            slice(a - part.start, b - part.start)
            for a, b, part in zip(starts, stops, block, strict=True)
        )
        there = [
            range(a - first, b - first) for a, b, first in zip(starts, stops, corner, strict=True)
        ]
        dataclasses.replace(whole, path=folder / _file_name(place)).cut(there).read_into(
            target[here]
        )


def _file_name(place: Iterable[int]) -> str:
    return ".".join(map(str, place))


def _describe(folder: Path, stored: StoredArray) -> None:
    """Writes beside the chunks of an array what they are."""
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
    # As with any copy of a file, the system writes to the disk when it likes.
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
