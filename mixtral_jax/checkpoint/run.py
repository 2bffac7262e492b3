"""Checkpoints of a run: a pytree and a small JSON record per step, saved while training goes on.

Knows pytrees and steps only. A checkpoint is a flat dictionary from the path of a leaf to its
array, so that what is on disk can be read without the classes that made it.
"""

from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


class RunCheckpoints:
    """The checkpoints under one folder, the newest `keep` of them.

    Use as a context: leaving it waits.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, create=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest committed step, or None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, record: dict[str, Any]) -> None:
        """Copies the arrays off the devices, then writes in the background."""
        leaves = _flatten(tree)
        # Stacks of matrices are cut into them, so that one can be read without the others.
        cuts = {
            name: ocp.SaveArgs(shard_axes=(0,) if leaf.ndim > 2 else ())
            for name, leaf in leaves.items()
        }
        state = ocp.args.StandardSave(leaves, save_args=cuts)
        items = ocp.args.Composite(state=state, record=ocp.args.JsonSave(record))
        is_saving = self._manager.save(step, args=items)
        assert is_saving, step

    def wait(self) -> None:
        """Returns once everything saved is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def read_record(self, step: int) -> dict[str, Any]:
        """The JSON record that was saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
            "record"
        ]

    def restore(self, step: int, abstract: Tree) -> Tree:
        """The tree of a step, each leaf straight into the sharding that `abstract` asks for.

        Raises:
            ValueError: a leaf is missing, unexpected, or of another shape or dtype.
        """
        wanted = _flatten(abstract)
        saved = self._manager.item_metadata(step).state
        # Orbax casts a wrong dtype without a word.
        wrong = [
            name for name in wanted if name in saved and saved[name].dtype != wanted[name].dtype
        ]
        if wrong:
            raise ValueError(
                f"checkpoint of step {step}: {', '.join(wrong)} was saved with another dtype"
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        restored = self._manager.restore(step, args=items)["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
