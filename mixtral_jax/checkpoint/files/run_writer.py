"""Chunks of parameters, already on disk, as a checkpoint of a run: Orbax makes it, so it is one as
`run` saves.

With `zarr_chunks` a model is imported from file to file; no more of it is in memory than a few
chunks.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mixtral_jax.checkpoint.files.stored import StoredArray


def adopt_chunks(
    checkpoints: Path,
    arrays: Mapping[str, StoredArray],
    folder: Path,
    record: Mapping[str, Any],
    wait: Callable[[], Any],
) -> None:
    """Makes the checkpoint of step 0 of arrays that `write_chunks` writes into `folder`, by moving
    them.

    All processes call it; it calls `wait` for the chunks of all to be there. `record` is saved
    beside the arrays.
    """
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays)), record=ocp.args.JsonSave(dict(record))
    )
    with (
        _without_warnings(),
        contextlib.closing(_make_manager(checkpoints, _AdoptHandler(folder, wait))) as manager,
    ):
        manager.save(0, args=items)


def _make_manager(checkpoints: Path, handler: "_AdoptHandler") -> ocp.CheckpointManager:
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


class _AdoptHandler(ocp.type_handlers.TypeHandler):
    """How Orbax is to write a `StoredArray`: as it writes a jax.Array, but the numbers are there
    already.
    """

    def __init__(self, folder: Path, wait: Callable[[], Any]):
        self._folder = folder
        self._wait = wait

    def typestr(self) -> str:
        return "jax.Array"  # What it will be when it is restored.

    async def serialize(
        self, values: Sequence[StoredArray], infos: Sequence[Any], args: Any = None
    ) -> list[Any]:
        self._wait()
        if jax.process_index() == 0:
            for info in infos:
                place = Path(info.parent_dir / info.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                (self._folder / info.name).rename(place)
        return []

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> list[Any]:
        raise NotImplementedError("is read as a jax.Array")

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("is read as a jax.Array")
