"""`FileTensor`: a tensor in a file, as an offset and strides; views of it, and reading.

`safetensors` and `torch_pickle` create these, and check that no number lies outside the file.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixtral_jax.checkpoint.files.stored import PART_BYTES, Order, bytes_of, copy_into, scratch
from mixtral_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a file.

    Attributes:
        offset: the byte of the file at which the first number begins.
        strides: the distance in bytes between neighbours along each dimension.
    """

    path: Path
    name: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def in_rows(
        cls, path: Path, name: str, dtype: np.dtype, offset: int, shape: tuple[int, ...]
    ) -> "FileTensor":
        """A contiguous tensor, row by row."""
        strides = tuple(
            math.prod(shape[dimension + 1 :]) * dtype.itemsize for dimension in range(len(shape))
        )
        return cls(path, name, dtype, offset, shape, strides)

    @classmethod
    def in_order(
        cls,
        path: Path,
        name: str,
        dtype: np.dtype,
        offset: int,
        shape: tuple[int, ...],
        order: Order,
    ) -> "FileTensor":
        """A contiguous tensor whose last dimension ("C") or first dimension ("F") is adjacent."""
        if order == "C":
            return cls.in_rows(path, name, dtype, offset, shape)
        return cls.in_rows(path, name, dtype, offset, shape[::-1]).transpose(
            range(len(shape))[::-1]
        )

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self, sizes: Sequence[Sequence[int]]) -> "FileTensor":
        """A view in which each dimension is split into dimensions of the given sizes."""
        shape, strides = [], []
        for stride, parts in zip(self.strides, sizes, strict=True):
            shape += parts
            strides += [stride * math.prod(parts[position + 1 :]) for position in range(len(parts))]
        return dataclasses.replace(self, shape=tuple(shape), strides=tuple(strides))

    def transpose(self, order: Sequence[int]) -> "FileTensor":
        """A view with the dimensions in another order."""
        shape, strides = (
            tuple(values[position] for position in order) for values in (self.shape, self.strides)
        )
        return dataclasses.replace(self, shape=shape, strides=strides)

    def cut(self, ranges: Sequence[range]) -> "FileTensor":
        """A view of the part within one range per dimension."""
        start = sum(part.start * stride for part, stride in zip(ranges, self.strides, strict=True))
        return dataclasses.replace(self, offset=self.offset + start, shape=tuple(map(len, ranges)))

    def read_into(self, target: np.ndarray) -> None:
        """Copies the numbers into an array of the same shape.

        Reads the file in parts that fit the processor's cache.

        Raises:
            ConfigError: the file cannot be read, or has become shorter since it was opened.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._copy(file, target)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: {self.name} cannot be read: {error.strerror}; check that the file "
                "still exists and is readable"
            ) from error

    def _copy(self, file: io.FileIO, target: np.ndarray) -> None:
        if 0 in self.shape:
            return
        last = sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        span = last + self.dtype.itemsize
        if span <= PART_BYTES or math.prod(self.shape) == 1:
            is_in_place = self._lies_like(target)
            raw = bytes_of(target) if is_in_place else scratch("part", (span,), np.dtype(np.uint8))
            file.seek(self.offset)
            if file.readinto(raw.data) < span:
                raise ConfigError(
                    f"{self.path} is truncated: it ends within {self.name}; copy it again"
                )
            if not is_in_place:
                copy_into(target, np.ndarray(self.shape, self.dtype, raw, strides=self.strides))
            return
        axis = max(
            range(len(self.shape)), key=lambda axis: self.strides[axis] * (self.shape[axis] > 1)
        )
        step = max(1, PART_BYTES // self.strides[axis])
        for start in range(0, self.shape[axis], step):
            ranges = [range(size) for size in self.shape]
            ranges[axis] = ranges[axis][start : start + step]
            self.cut(ranges)._copy(
                file, target[tuple(slice(part.start, part.stop) for part in ranges)]
            )

    def _lies_like(self, target: np.ndarray) -> bool:
        """Whether an array of the same shape has the file's dtype and memory order.

        Then bytes can be read straight into it.
        """
        strides = zip(self.shape, self.strides, target.strides, strict=True)
        return (
            target.dtype == self.dtype
            and target.flags.forc
            and all(a == b for n, a, b in strides if n > 1)
        )
