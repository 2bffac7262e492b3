"""The checkpoints of a run: saves a step in the background, finds the newest, and restores it.

This module knows only pytrees and steps. Readers of other rooms find steps with `run_parameters`. A
checkpoint has a small JSON record and a flat dictionary from the path of each leaf to its array, so
that it can be read without the classes that made it.
"""

from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


class RunCheckpoints:
    """The checkpoints in one folder; keeps the newest `keep` and deletes older ones.

    Use it as a context manager: leaving it waits until everything is saved.
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
        """Saves a tree and its record. Returns once the arrays are copied off the devices."""
        leaves = _flatten(tree)
        # Stacks of matrices are cut into chunks, so that one can be read without the others.
        cuts = {
            name: ocp.SaveArgs(shard_axes=(0,) if leaf.ndim > 2 else ())
            for name, leaf in leaves.items()
        }
        state = ocp.args.StandardSave(leaves, save_args=cuts)
        items = ocp.args.Composite(state=state, record=ocp.args.JsonSave(record))
        is_saving = self._manager.save(step, args=items)
        assert is_saving, step

    def wait(self) -> None:
        """Waits until every save is on disk, and raises the error if one failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def read_record(self, step: int) -> dict[str, Any]:
        """The JSON record that was saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
            "record"
        ]

    def restore(self, step: int, abstract: Tree) -> Tree:
        """The tree of a step, with each leaf read directly into its sharding in `abstract`.

        Raises:
            ValueError: a leaf is missing, unexpected, or of another shape or dtype.
        """
        wanted = _flatten(abstract)
        saved = self._manager.item_metadata(step).state
        differing = sorted(wanted.keys() ^ saved.keys())
        if differing:
            raise ValueError(
                f"checkpoint of step {step} has other leaves than the state that resumes, such as "
                f"{differing[0]}"
            )
        # Orbax would cast a leaf of another dtype without a warning.
        wrong = [
            name for name in wanted if name in saved and saved[name].dtype != wanted[name].dtype
        ]
        if wrong:
            raise ValueError(
                f"checkpoint of step {step}: {', '.join(wrong)} was saved with another dtype; "
                "resume with the config that it was saved with"
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        restored = self._manager.restore(step, args=items)["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
