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

from mixtral_jax.config import Config, ConfigError, require
from mixtral_jax.config import changed_keys
from mixtral_jax.parallel.processes import Processes

# Network file systems remember for some seconds that a file was not there.
_VISIBLE_SECONDS = 15.0

# Each of several processes would choose a folder of its own.
NEEDED = "--workdir is needed with several processes: name a folder on storage that all of them share"


class WorkdirInUseError(ConfigError):
    """Another process on this host is running in the folder."""


def open_workdir(workdir: Path, config: Config, processes: Processes) -> None:
    """Process 0 writes config.json, if this run may continue what lies there; all make sure that
    they see it.

    Raises:
        ConfigError: the folder holds a run of another config, or is not the same one everywhere.
    """
    if processes.index == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _lock(workdir)
            check_saved(workdir, config)
            write_json(workdir / "config.json", dataclasses.asdict(config))
        except OSError as error:
            raise not_writable(workdir, error.strerror or str(error)) from error
    require_seen_by_all(workdir, processes)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is whole whenever it is there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Names of files need be no UTF-8: \udc80 in JSON.
    temporary.write_text(text, "utf-8", errors="backslashreplace")
    temporary.replace(path)


def not_writable(workdir: Path, reason: str) -> ConfigError:
    """What to say of a workdir in which no file can be made."""
    return ConfigError(f"--workdir={workdir} cannot be written ({reason}): name another, or mend its rights")


def require_seen_by_all(workdir: Path, processes: Processes) -> None:
    """Makes sure that all processes see what process 0 writes into `workdir`, an existing folder
    there.

    Raises:
        ConfigError: names those that do not.
    """
    blind = _find_blind(workdir, processes)
    require(
        not blind,
        f"--workdir={workdir} of process 0 is not seen by process {', '.join(map(str, blind))}: "
        "name a folder on "
        "storage that all processes share, by the same path",
    )


def _find_blind(workdir: Path, processes: Processes) -> list[int]:
    """The processes that do not see a file which process 0 puts into `workdir`, an existing folder
    there.
    """
    if processes.count == 1:
        return []
    name = f".seen-by-all-{secrets.token_hex(8)}"
    if processes.index == 0:
        (workdir / name).touch()
    name = processes.share("workdir", name)[0]
    try:
        sees = processes.share("workdir seen", waits_for(workdir / name))
    finally:
        if processes.index == 0:
            (workdir / name).unlink()
    return [index for index, does in enumerate(sees) if not does]


def _lock(workdir: Path) -> None:
    """Keeps other runs on this host out of the folder for as long as this process lives."""
    # Never closed: that would unlock it.
    descriptor = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise WorkdirInUseError(f"--workdir={workdir} is in use by another run: wait for it, or name another") from None
    except OSError:
        # Some network file systems have no locks: there, two runs are not kept apart.
        os.close(descriptor)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is within it for the same folder, which is made if it is not
    there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        # Some network file systems have no locks: there, nobody waits.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def waits_for(path: Path) -> bool:
    """Whether what another process has written is seen here, within some seconds."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def changed_since(workdir: Path, config: Config, also_fixed: tuple[str, ...] = ()) -> list[str]:
    """The keys, with both values, in which `config` differs from the run in `workdir` and may not;
    none without a run.

    `also_fixed` are keys that may otherwise change between the starts of a run.

    Raises:
        ConfigError: the config that lies there cannot be read.
    """
    path = workdir / "config.json"
    # A start that failed before its first checkpoint binds nobody to its config.
    if not path.exists() or not any((workdir / "checkpoints").glob("[0-9]*")):
        return []
    try:
        saved = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it to go on with the config given now") from None
    return changed_keys(saved, dataclasses.asdict(config), also_fixed=also_fixed)


def check_saved(workdir: Path, config: Config, section: str = "") -> None:
    """Makes sure that a run which has saved a checkpoint may go on with this config, as far as
    `section` goes.

    Raises:
        ConfigError: names the keys that changed; or the config that lies there is damaged.
    """
    changed = [key for key in changed_since(workdir, config) if key.startswith(section)]
    require(
        not changed,
        f"{workdir} holds a run of another config; changed: {', '.join(changed)}. Use another "
        "--workdir, or "
        "change only train.num_steps, train.eval_every, train.log_every, mesh, dispatch.transport, "
        "log, checkpoint",
    )
