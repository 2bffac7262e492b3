"""Parameters from other files into a checkpoint of a run, by the block: a model needs no memory to be imported.

Orbax writes the checkpoint, and asks here for the numbers, so it is one as `run` saves and restores.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from mixtral_jax.checkpoint.run_parameters import parameter_key
from mixtral_jax.checkpoint.stored import Block, StoredArray, blocks_of, run_jobs, scratch, write_numbers


def save_parameters(
    checkpoints: Path, parameters: Mapping[str, StoredArray], record: Mapping[str, Any], report: Callable[[int], None]
) -> None:
    """Writes the checkpoint of step 0, of parameters alone; each process writes its share.

    Args:
        record: is saved beside them, as with a checkpoint of `run`.
        report: is told the bytes of each block that is written.
    """
    tree = {parameter_key("trained", parameter): stored for parameter, stored in parameters.items()}
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), record=ocp.args.JsonSave(dict(record)))
    with _without_warnings(), contextlib.closing(_make_manager(checkpoints, _StreamHandler(report))) as manager:
        manager.save(0, args=items)


def _make_manager(checkpoints: Path, handler: "_StreamHandler") -> ocp.CheckpointManager:
    registry = ocp.type_handlers.create_type_handler_registry((StoredArray, handler))
    handlers = {
        # Each chunk in a file of its own: the other format collects what it is given in memory.
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry),
        "record": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)
    return ocp.CheckpointManager(checkpoints.absolute(), item_handlers=handlers, options=options)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that nothing here is a jax.Array, and that not all is in one file."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _StreamHandler(ocp.type_handlers.TypeHandler):
    """How Orbax is to write a `StoredArray`: as it writes a jax.Array, but a chunk at a time."""

    def __init__(self, report: Callable[[int], None]):
        self._report = report

    def typestr(self) -> str:
        return "jax.Array"  # What it will be when it is restored.

    async def serialize(self, values: Sequence[StoredArray], infos: Sequence[Any], args: Any = None) -> list[Any]:
        folders = [Path(info.parent_dir / info.name) for info in infos]
        for stored, folder in zip(values, folders, strict=True):
            _create(stored, folder)
        jobs = (
            functools.partial(_write_chunk, stored, folder, block)
            for stored, folder in zip(values, folders, strict=True)
            for block in blocks_of(stored.shape, stored.chunk)
        )
        for num_bytes in run_jobs(itertools.islice(jobs, jax.process_index(), None, jax.process_count())):
            self._report(num_bytes)
        return []

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> list[Any]:
        raise NotImplementedError("is read as a jax.Array")

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("is read as a jax.Array")


def _create(stored: StoredArray, folder: Path) -> None:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "dtype": stored.dtype.name,
        "metadata": {"shape": stored.shape, "chunks": stored.chunk, "compressor": None},
    }
    # All processes create the same, so whoever comes first may.
    tensorstore.open(spec, create=True, open=True).result()


def _write_chunk(stored: StoredArray, folder: Path, block: Block) -> int:
    """Writes a chunk as zarr has it: its numbers and nothing else, in a file named after its place.

    tensorstore would copy the numbers first, and wait for the disk; that took several times as long.
    """
    numbers = scratch(stored.chunk, stored.dtype)
    stored.read_into(block, numbers)
    place = ".".join(str(part.start // size) for part, size in zip(block, stored.chunk, strict=True))
    with open(folder / place, "xb", buffering=0) as file:
        write_numbers(file.fileno(), numbers, 0)
    return numbers.nbytes
