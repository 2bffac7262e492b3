"""`StoredArray`: an array on disk of which any block can be read without reading the rest.

Every reader returns these and every writer takes them, so that nothing between the two holds more
than a block in memory.
"""

import concurrent.futures
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from mixtral_jax.config import require

# A start and a stop for each dimension.
Block = tuple[slice, ...]
# As in numpy: in "C" the numbers of the last dimension are adjacent, in "F" those of the first.
Order = Literal["C", "F"]

# Each thread holds a block in memory, so more threads need more memory.
NUM_THREADS = min(4, os.cpu_count() or 1)
# numpy copies element by element in the order of the target. Transposing 14,336 x 4,096 bfloat16
# numbers at once was measured at 0.2 GB/s. In strips of 64 columns it ran at 5 GB/s, but at 1.1
# where the source rows lie a multiple of the page size apart, since they then share one cache set.
_STRIP_COLUMNS = 64
_PAGE_BYTES = 4096
_CACHE_LINE_BYTES = 64
# Linux keeps the data of one write in one piece of memory, and may have to make room for it first:
# writing a megabyte at a time was measured to take up to six times as long.
_MAX_WRITE_BYTES = 2**16
# Numbers are read in parts of this size, so that a part is still in the cache when it is put in
# order or written.
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
        chunk: the shape that is best read at once; blocks that are aligned to it are fastest.
        read_into: copies a block into an array of the block's shape; raises ConfigError if a file
            is damaged.
        name: shown in error messages, such as the file and the tensor in it.
        order: the order of a chunk's numbers on disk; None if it is neither "C" nor "F".
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    read_into: Callable[[Block, np.ndarray], None]
    name: str
    order: Order | None = None

    @property
    def nbytes(self) -> int:
        """Size of the whole array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def whole(self) -> Block:
        """The block that covers the whole array."""
        return tuple(slice(0, size) for size in self.shape)

    def read(self, block: Block) -> np.ndarray:
        """Returns a block as a new array."""
        numbers = np.empty(shape_of(block), self.dtype)
        self.read_into(block, numbers)
        return numbers

    def parts_of(self, block: Block) -> Iterator[Block]:
        """Cuts a chunk into parts that fit the processor's cache, in their order on disk.

        The only part is the whole chunk where `order` is None.
        """
        if self.order is None:
            return iter([block])
        axes = [axis for axis, size in enumerate(shape_of(block)) if size > 1] or [0]
        axis = axes[0 if self.order == "C" else -1]
        part = list(shape_of(block))
        part[axis] = max(1, PART_BYTES * part[axis] // (math.prod(part) * self.dtype.itemsize))
        starts = [outer.start for outer in block]
        return (shift_block(inner, starts) for inner in blocks_of(shape_of(block), tuple(part)))

    def astype(self, dtype: np.dtype) -> "StoredArray":
        """The same array in another dtype.

        Reading raises ConfigError if a number is too large for the new dtype.
        """
        if dtype == self.dtype:
            return self

        def read_into(block: Block, target: np.ndarray) -> None:
            numbers = scratch("cast", shape_of(block), self.dtype, self.order)
            self.read_into(block, numbers)
            with np.errstate(over="ignore"):  # Reported below, with the array's name.
                target[...] = numbers
            is_kept = np.isfinite(target).all() or np.array_equal(
                np.isfinite(target), np.isfinite(numbers)
            )
            require(
                is_kept,
                f"{self.name} holds numbers that are too large for {dtype.name}: choose another "
                "dtype, such as bfloat16 or float32",
            )

        return dataclasses.replace(self, dtype=dtype, read_into=read_into)


def shape_of(block: Block) -> tuple[int, ...]:
    """The shape of a block."""
    return tuple(part.stop - part.start for part in block)


def scratch(
    use: str, shape: tuple[int, ...], dtype: np.dtype, order: Order | None = None
) -> np.ndarray:
    """An uninitialised array in memory that this thread reuses, since fresh memory is slow to get.

    The array is valid until the same thread asks for another one with the same `use`.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = _of_this_thread.raw.get(use)
    if raw is None or raw.nbytes < num_bytes:
        raw = _of_this_thread.raw[use] = np.empty(num_bytes, np.uint8)
    return raw[:num_bytes].view(dtype).reshape(shape, order=order or "C")


def bytes_of(numbers: np.ndarray) -> np.ndarray:
    """The bytes of an array as they lie in memory; the array must be contiguous, in "C" or "F"."""
    return numbers.reshape(-1, order="A", copy=False).view(np.uint8)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Does `target[...] = source`, strip by strip if their memory orders differ.

    Both have the same shape.
    """
    order = np.argsort([-stride for stride in target.strides], kind="stable")
    target, source = target.transpose(order), source.transpose(order)
    if target.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _STRIP_COLUMNS):
        strip = source[..., start : start + _STRIP_COLUMNS]
        if strip.strides[-1] % _PAGE_BYTES == 0:
            strip = _spread(strip)
        target[..., start : start + _STRIP_COLUMNS] = strip


def _spread(strip: np.ndarray) -> np.ndarray:
    """Copies a strip so that its stride along the last dimension is no multiple of the page size.

    The rows then spread evenly over the sets of the cache.
    """
    step = strip[..., 0].nbytes + _CACHE_LINE_BYTES
    raw = scratch("strip", (strip.shape[-1] * step,), np.dtype(np.uint8))
    others = [
        math.prod(strip.shape[axis + 1 : -1]) * strip.itemsize for axis in range(strip.ndim - 1)
    ]
    copy = np.ndarray(strip.shape, strip.dtype, raw, strides=(*others, step))
    copy[...] = strip
    return copy


def write_numbers(descriptor: int, numbers: np.ndarray, place: int) -> None:
    """Writes the bytes of a contiguous array to an open file, from byte `place` on.

    Raises:
        OSError: the file cannot be written.
    """
    raw = bytes_of(numbers).data
    while len(raw):
        written = os.pwrite(descriptor, raw[:_MAX_WRITE_BYTES], place)
        raw, place = raw[written:], place + written


def shift_block(block: Block, starts: Sequence[int]) -> Block:
    """Moves a block from the start of an array to `starts`."""
    return tuple(
        slice(part.start + start, part.stop + start)
        for part, start in zip(block, starts, strict=True)
    )


def blocks_of(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Block]:
    """The blocks of shape `chunk` that tile an array of `shape`, smaller ones at the ends."""
    for place in np.ndindex(*(-(-size // step) for size, step in zip(shape, chunk, strict=True))):
        starts = [i * step for i, step in zip(place, chunk, strict=True)]
        yield tuple(
            slice(a, min(a + step, size))
            for a, step, size in zip(starts, chunk, shape, strict=True)
        )


def run_jobs(jobs: Iterable[Callable[[], int]]) -> Generator[int]:
    """Runs jobs in threads and yields the result of each as it ends.

    The first error cancels the jobs that have not started, and is raised.
    """
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
