"""Arrays copied into the chunk files of zarr, by threads and by processes, each its share.

A chunk that is not compressed is its numbers and nothing else, in a file named after its place
(https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html). tensorstore would copy the numbers first, and wait for the
disk: that took several times as long. Knows no jax, which takes as long to start as a gigabyte to copy.
"""

import functools
import itertools
from collections.abc import Generator, Mapping
from pathlib import Path

import tensorstore

from mixtral_jax.checkpoint.stored import Block, StoredArray, blocks_of, run_jobs, scratch, write_numbers


def write_chunks(folder: Path, arrays: Mapping[str, StoredArray], index: int = 0, count: int = 1) -> Generator[int]:
    """Writes every array into the folder of its name; gives the bytes of each chunk as it is done.

    Of `count` processes that are given the same, this is number `index`.

    Raises:
        ConfigError: a file that is read is damaged.
        OSError: a file cannot be written.
    """
    for name in arrays:
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = (
        functools.partial(_write_chunk, folder / name, stored, block)
        for name, stored in arrays.items()
        for block in blocks_of(stored.shape, stored.chunk)
    )
    return run_jobs(itertools.islice(jobs, index, None, count))


def describe_chunks(folder: Path, stored: StoredArray) -> None:
    """Writes beside the chunks of an array what they are."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "dtype": stored.dtype.name,
        "metadata": {"shape": stored.shape, "chunks": stored.chunk, "compressor": None},
    }
    tensorstore.open(spec, create=True, open=True).result()


def _write_chunk(folder: Path, stored: StoredArray, block: Block) -> int:
    numbers = scratch("chunk", stored.chunk, stored.dtype)
    stored.read_into(block, numbers)
    place = ".".join(str(part.start // size) for part, size in zip(block, stored.chunk, strict=True))
    with open(folder / place, "xb", buffering=0) as file:
        write_numbers(file.fileno(), numbers, 0)
    return numbers.nbytes
