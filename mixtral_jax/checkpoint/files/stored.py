"""Arrays on disk of which any block can be read: what weights are before they are loaded, and
between formats.

Every reader gives these and every writer takes them, so that nothing between the two holds more
than a block.
"""

import concurrent.futures
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Literal

import ml_dtypes
import numpy as np

from mixtral_jax.config import require

Block = tuple[slice, ...]  # A start and a stop for each dimension.
Order = Literal[
    "C", "F"
]  # As in numpy: the numbers of the last dimension follow each other, or those of the first.

# What each reads and makes of it is in memory at once.
NUM_THREADS = min(4, os.cpu_count() or 1)
# numpy copies element by element in the order of the target. A transposition of 14,336 x 4,096
# numbers of bfloat16 was measured at 0.2 GB/s in one go. In columns of so many it was 1.1, where
# the rows that they come from are whole pages apart and so fall into one set of the cache, and 5
# where they are not.
_STRIP = 64
_PAGE = 4096
_CACHE_LINE = 64
# Linux keeps what is written at once in one piece of memory, and may have to make room for it: to
# write by the megabyte was measured to take up to six times as long.
_WRITE_BYTES = 2**16
# What is read at once, and put in order or written while it is in the cache.
PART_BYTES = 2**20


class _Scratch(threading.local):
    def __init__(self):
        self.raw: dict[str, np.ndarray] = {}


_of_this_thread = _Scratch()

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array that is still on disk.

    Attributes:
        chunk: the shape of what is best read in one go; blocks are best aligned to it.
        read_into: copies a block into an array of its shape; raises ConfigError if a file is
            damaged.
        name: for people, such as the file and the tensor in it.
        order: how the numbers of a chunk follow each other on disk; None if otherwise than in "C"
            or "F".
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    read_into: Callable[[Block, np.ndarray], None]
    name: str
    order: Order | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def whole(self) -> Block:
        """The block that is all of it."""
        return tuple(slice(0, size) for size in self.shape)

    def read(self, block: Block) -> np.ndarray:
        """A block, in memory of its own."""
        numbers = np.empty(shape_of(block), self.dtype)
        self.read_into(block, numbers)
        return numbers

    def parts_of(self, block: Block) -> Iterator[Block]:
        """A chunk in parts that fit a processor's cache, as they follow each other on disk; whole,
        if in no order.
        """
        if self.order is None:
            return iter([block])
        axes = [axis for axis, size in enumerate(shape_of(block)) if size > 1] or [0]
        axis = axes[0 if self.order == "C" else -1]
        part = list(shape_of(block))
        part[axis] = max(1, PART_BYTES * part[axis] // (math.prod(part) * self.dtype.itemsize))
        return (_shift(inner, block) for inner in blocks_of(shape_of(block), tuple(part)))

    def astype(self, dtype: np.dtype) -> "StoredArray":
        """The same numbers in another dtype; reading raises ConfigError if one of them is too large
        for it.
        """
        if dtype == self.dtype:
            return self

        def read_into(block: Block, target: np.ndarray) -> None:
            numbers = scratch("cast", shape_of(block), self.dtype, self.order)
            self.read_into(block, numbers)
            with np.errstate(over="ignore"):  # Said below, in words.
                target[...] = numbers
            is_kept = np.isfinite(target).all() or np.array_equal(
                np.isfinite(target), np.isfinite(numbers)
            )
            require(
                is_kept,
                f"{self.name} holds numbers that are too large for {dtype.name}: choose another "
                "dtype",
            )

        return dataclasses.replace(self, dtype=dtype, read_into=read_into)


def shape_of(block: Block) -> tuple[int, ...]:
    """The shape of a block."""
    return tuple(part.stop - part.start for part in block)


def scratch(
    use: str, shape: tuple[int, ...], dtype: np.dtype, order: Order | None = None
) -> np.ndarray:
    """An array that is good until this thread asks for the next of the same use: fresh memory is
    slow to come by.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = _of_this_thread.raw.get(use)
    if raw is None or raw.nbytes < num_bytes:
        raw = _of_this_thread.raw[use] = np.empty(num_bytes, np.uint8)
    return raw[:num_bytes].view(dtype).reshape(shape, order=order or "C")


def bytes_of(numbers: np.ndarray) -> np.ndarray:
    """The bytes of an array as they lie in memory, without gaps in either order."""
    return numbers.reshape(-1, order="A", copy=False).view(np.uint8)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` of equal shapes, in strips where one is the other transposed."""
    order = np.argsort([-stride for stride in target.strides], kind="stable")
    target, source = target.transpose(order), source.transpose(order)
    if target.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _STRIP):
        strip = source[..., start : start + _STRIP]
        if strip.strides[-1] % _PAGE == 0:
            strip = _spread(strip)
        target[..., start : start + _STRIP] = strip


def _spread(strip: np.ndarray) -> np.ndarray:
    """A copy whose steps along the last dimension are no whole pages, so that they fill the cache
    evenly.
    """
    step = strip[..., 0].nbytes + _CACHE_LINE
    raw = scratch("strip", (strip.shape[-1] * step,), np.dtype(np.uint8))
    others = [
        math.prod(strip.shape[axis + 1 : -1]) * strip.itemsize for axis in range(strip.ndim - 1)
    ]
    copy = np.ndarray(strip.shape, strip.dtype, raw, strides=(*others, step))
    copy[...] = strip
    return copy


def write_numbers(descriptor: int, numbers: np.ndarray, place: int) -> None:
    """Writes an array as it lies in memory, without gaps, to byte `place` of an open file; raises
    OSError.
    """
    raw = bytes_of(numbers).data
    while len(raw):
        written = os.pwrite(descriptor, raw[:_WRITE_BYTES], place)
        raw, place = raw[written:], place + written


def _shift(inner: Block, block: Block) -> Block:
    return tuple(
        slice(a.start + b.start, a.stop + b.start) for a, b in zip(inner, block, strict=True)
    )


def blocks_of(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Block]:
    """Blocks of the shape `chunk`, those at the ends smaller, that tile an array of `shape`."""
    for place in np.ndindex(*(-(-size // step) for size, step in zip(shape, chunk, strict=True))):
        starts = [i * step for i, step in zip(place, chunk, strict=True)]
        yield tuple(
            slice(a, min(a + step, size))
            for a, step, size in zip(starts, chunk, shape, strict=True)
        )


def run_jobs(jobs: Iterable[Callable[[], int]]) -> Generator[int]:
    """Runs jobs that read and write in threads, and gives what each returns as they end; the first
    error ends it.
    """
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
