"""The folder of a run: whose config it holds, and whether all processes see the same one."""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.formats.side_files import SIDE_FILES
from mixtral_jax.config import RESUMABLE_KEYS, Config, ConfigError, changed_keys, require
from mixtral_jax.data.sources import find_weights
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.whole_files import write_json

# Network file systems remember for some seconds that a file did not exist.
VISIBLE_TIMEOUT_SECONDS = 15.0
VISIBLE_POLL_SECONDS = 0.2

# Without it, each of several processes would choose a folder of its own.
NEEDED = (
    "--workdir is needed with several processes: name a folder on storage that all of them share"
)


class WorkdirInUseError(ConfigError):
    """Another process on this host is running in the folder."""


def open_workdir(workdir: Path, config: Config, processes: Processes) -> None:
    """Makes the folder of a run; process 0 writes config.json into it, and all wait to see it.

    What an earlier start left that saved no checkpoint is removed, if it would be read as this
    run's: it may have had another base, or other text.

    Raises:
        ConfigError: the folder holds a run of another config, or is not the same one everywhere.
    """
    if processes.index == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _lock(workdir)
            check_saved(workdir, config)
            _forget_unsaved(workdir, config)
            _write_config(workdir, config, _read_saved_data(workdir))
        except OSError as error:
            raise not_writable(workdir, error.strerror or str(error)) from error
    require_seen_by_all(workdir, processes)


def not_writable(workdir: Path, reason: str) -> ConfigError:
    """The error for a workdir in which no file can be made."""
    return ConfigError(
        f"--workdir={workdir} cannot be written ({reason}): name another, or change its permissions"
    )


def require_seen_by_all(workdir: Path, processes: Processes) -> None:
    """Makes sure that all processes see what process 0 writes into `workdir`.

    The folder must exist on process 0.

    Raises:
        ConfigError: names the processes that do not see it.
    """
    blind = _find_blind(workdir, processes)
    require(
        not blind,
        f"--workdir={workdir} of process 0 is not seen by process "
        f"{', '.join(map(str, blind))}: name a folder on storage that all processes share, by the "
        "same path",
    )


def _find_blind(workdir: Path, processes: Processes) -> list[int]:
    """The processes that do not see a file which process 0 puts into `workdir`."""
    if processes.count == 1:
        return []
    name = f".seen-by-all-{secrets.token_hex(8)}"
    if processes.index == 0:
        (workdir / name).touch()
    name = processes.share("workdir", name)[0]
    try:
        sees = processes.share("workdir seen", wait_until_visible(workdir / name))
    finally:
        if processes.index == 0:
            (workdir / name).unlink()
    return [index for index, is_seen in enumerate(sees) if not is_seen]


# Workdirs that this process holds, with their lock files: closing one unlocks it.
_held: dict[Path, int] = {}


def _lock(workdir: Path) -> None:
    """Keeps runs of other processes on this host out of the folder, until `release_workdirs`."""
    folder = workdir.resolve()
    if folder in _held:
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held[folder] = descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise WorkdirInUseError(
            f"--workdir={workdir} is in use by another run: wait for it, or name another"
        ) from None
    except OSError:
        # Some network file systems have no locks: there, two runs are not kept apart.
        os.close(descriptor)


def release_workdirs() -> None:
    """Lets other runs into the workdirs that this process holds, without ending it."""
    while _held:
        os.close(_held.popitem()[1])


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one process at a time work on a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # Some network file systems have no locks.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_until_visible(path: Path) -> bool:
    """Waits up to `VISIBLE_TIMEOUT_SECONDS` for a path that another process has made."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(VISIBLE_POLL_SECONDS)
    return True


def changed_since(workdir: Path, config: Config, also_fixed: tuple[str, ...] = ()) -> list[str]:
    """The keys, with both values, that may not differ from the run in `workdir` but do.

    Empty if no run has saved a checkpoint there: a start that failed before its first checkpoint
    binds nobody to its config.

    Args:
        also_fixed: keys that may otherwise change between the starts of a run.

    Raises:
        ConfigError: the config in the folder cannot be read.
    """
    saved = _read_saved(workdir)
    if saved is None:
        return []
    changed = changed_keys(saved, dataclasses.asdict(config), also_fixed=also_fixed)
    before, after = saved.get("data", {}).get("path", config.data.path), config.data.path
    if find_weights(before) != find_weights(after):
        changed.append(f"the weights of data.path ({before!r} -> {after!r})")
    return changed


def adopt_data(workdir: Path, config: Config) -> list[str]:
    """Writes into config.json where the data are, once they are known to be those of the run.

    Returns:
        A line for each place that is another than before.
    """
    before, data = _read_saved_data(workdir), config.data
    _write_config(workdir, config, {})
    places = {
        "path": (data.path, "the content is the same"),
        "held_out": (data.held_out, "evaluations are of the data there from now on"),
    }
    return [
        f"data.{key} was {before[key]}, and is now {now}: {meaning}"
        for key, (now, meaning) in places.items()
        if key in before and before[key] != now
    ]


def _forget_unsaved(workdir: Path, config: Config) -> None:
    if not (workdir / "config.json").exists() or _read_saved(workdir) is not None:
        return
    (workdir / SIDE_FILES).unlink(missing_ok=True)
    if config.data.tokenizer.startswith("train:"):  # Another one is refused if it is not the same.
        (workdir / "tokenizer.model").unlink(missing_ok=True)


def _write_config(workdir: Path, config: Config, saved_data: dict[str, Any]) -> None:
    """Writes config.json; with the data of an earlier start, if there was one."""
    written = dataclasses.asdict(config)
    written["data"] |= saved_data
    write_json(workdir / "config.json", written)


def _read_saved_data(workdir: Path) -> dict[str, Any]:
    """The section `data` of a run that has saved a checkpoint; empty if there is none."""
    return (_read_saved(workdir) or {}).get("data", {})


def _read_saved(workdir: Path) -> dict[str, Any] | None:
    """The config of a run that has saved a checkpoint; None if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists() or not any((workdir / "checkpoints").glob("[0-9]*")):
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is damaged ({error}): delete it to resume with the config given now"
        ) from None


def check_saved(workdir: Path, config: Config, section: str = "") -> None:
    """Makes sure that a run which has saved a checkpoint may resume with this config.

    Args:
        section: compares only keys that begin with it.

    Raises:
        ConfigError: names the keys that changed; or the config in the folder is damaged.
    """
    changed = [key for key in changed_since(workdir, config) if key.startswith(section)]
    require(
        not changed,
        f"{workdir} holds a run of another config; changed: {', '.join(changed)}. Use another "
        f"--workdir, or change only {', '.join(RESUMABLE_KEYS)}",
    )
