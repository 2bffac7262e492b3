"""Turns chunks of parameters that are already on disk into a run's checkpoint, by moving them.

Orbax writes the checkpoint, so it is like those that `run` saves. Together with
`files.zarr_chunks` this imports a model from file to file, with only a few chunks in memory.
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
    """Makes the checkpoint of step 0 from the arrays that `write_chunks` writes into `folder`.

    All processes call it. It moves the chunks.

    Args:
        record: saved beside the arrays.
        wait: returns once all processes have written their chunks.
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
        # Without OCDBT each chunk has its own file. OCDBT would collect the chunks in memory.
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry),
        "record": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)
    return ocp.CheckpointManager(checkpoints.absolute(), item_handlers=handlers, options=options)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences Orbax, which warns that nothing here is a jax.Array and that OCDBT is not used."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _AdoptHandler(ocp.type_handlers.TypeHandler):
    """Tells Orbax how to write a `StoredArray`: as a jax.Array whose chunks are already written."""

    def __init__(self, folder: Path, wait: Callable[[], Any]):
        self._folder = folder
        self._wait = wait

    def typestr(self) -> str:
        return "jax.Array"  # The type that Orbax restores it as.

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
        raise NotImplementedError("restored as a jax.Array, by the handler of jax.Array")

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("restored as a jax.Array, by the handler of jax.Array")
