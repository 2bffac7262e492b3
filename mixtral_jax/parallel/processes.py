"""The processes of a run: how they find each other, agree, and end together.

jax's coordination service, which process 0 hosts, carries the messages: it works before any device
is touched and while a collective hangs. One process that stops tells the others why, and they stop
too, within seconds; jax alone would let them wait for its heartbeats, or for ever. What is compared
is for `agreement`.
"""

import collections
import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax

# jax has no public way to send a message between processes without devices. Orbax and others use
# this client too.
from jax._src import distributed

from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.coordinator import (
    JOIN_SECONDS,
    Launch,
    find_scheduler,
    proxy_hint,
    require_reachable,
)

# Of a process that vanished without a word, while the others hang in a collective; jax then aborts
# them. A host that swaps or migrates may be silent for some tens of seconds.
HEARTBEAT_SECONDS = 60
# All have said by then that they are at their end (`Processes.__exit__`), and only leave.
SHUTDOWN_SECONDS = 60

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 2.0  # for a process to find out by itself what stopped another
_FAREWELL_SECONDS = (
    10.0  # process 0, which hosts the messages, waits for the others to have read the last one
)
_ROOT = "mixtral_jax"


@dataclasses.dataclass(frozen=True)
class _Stop:
    """Why a process stopped, in a line for people, and the exit code that all then end with."""

    line: str
    code: int


class Processes:
    """All processes of a run, and the place of this one among them. Use as a context, around all
    work they share.

    When one leaves the context by an exception, that is told to the others, which print it and end
    with the same exit code, wherever they are. With a single process the context does nothing.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, preemption: Any = None):
        self.index = index
        self.count = count
        self._client = client
        self._preemption = preemption
        self._times_asked = 0
        self._rounds: collections.Counter[str] = collections.Counter()
        self._is_over = threading.Event()
        self._ending = threading.Lock()  # Whichever thread holds it ends the process.
        self._watch = threading.Thread(target=self._watch_others, name="processes", daemon=True)

    def share(self, name: str, value: Any, seconds: float | None = None) -> list[Any]:
        """Gives every process's value of `name`, in their order, to each; values are what JSON can
        hold.

        Args:
            name: of this exchange; whenever a name comes again, it comes again on all of them.
            seconds: how long to wait for the others; None waits as long as they live.

        Raises:
            SystemExit: code 1, with a line that names the processes that said nothing.
        """
        if self._client is None:
            return [value]
        self._rounds[name] += 1
        folder = f"{_ROOT}/{name}/{self._rounds[name]}/"
        self._client.key_value_set(f"{folder}{self.index}", json.dumps(value))
        start, pause = time.monotonic(), 0.01
        while len(found := self._client.key_value_dir_get(folder)) < self.count:
            if seconds is not None and time.monotonic() - start > seconds:
                silent = sorted(set(range(self.count)) - {_last_part(key) for key, _ in found})
                raise SystemExit(
                    f"error: process {', '.join(map(str, silent))} did not tell its {name} within "
                    f"{seconds:.0f} s: "
                    "see what it printed"
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return [json.loads(said) for _, said in sorted(found, key=lambda pair: _last_part(pair[0]))]

    def is_stopping(self) -> bool:
        """Whether to stop now, as SIGTERM told one of several; on each, the same answer to the nth
        time it is asked.

        jax lets all stop at the first number that none has asked about yet: numbers must grow by
        one, from 1, whatever step a run goes on from, and however many runs follow each other.
        """
        self._times_asked += 1
        return self._preemption is not None and self._preemption.reached_sync_point(
            self._times_asked
        )

    def __enter__(self) -> "Processes":
        if self._client is not None:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if self._client is None:
            return
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.share("end", "")
            self._is_over.set()
            self._watch.join()
            if self._preemption is not None:
                self._preemption.shutdown()
            return
        self._is_over.set()
        self._ending.acquire()
        others = self._read_stops()
        if others and isinstance(error, Exception) and not isinstance(error, ConfigError):
            # Such as the error of a collective that broke off when another process ended: not the
            # cause.
            self._print_and_leave(others[0])
        stop = _describe(error)
        self._tell(stop)
        if stop.code == 1 and not isinstance(error, SystemExit):
            traceback.print_exception(error)
            self._leave(stop.code)
        self._print_and_leave(stop)

    def refuse(self, error: ConfigError) -> None:
        """Ends all, since this one was started wrongly, and has said so itself; returns where it is
        alone.
        """
        if self._client is not None:
            stop = _describe(error)
            self._tell(stop)
            self._leave(stop.code)

    def _tell(self, stop: _Stop) -> None:
        stop = _Stop(
            f"process {self.index} on {socket.gethostname()} stopped: {stop.line}", stop.code
        )
        with contextlib.suppress(
            jax.errors.JaxRuntimeError
        ):  # Process 0 is gone, and its messages with it.
            self._client.key_value_set(
                f"{_ROOT}/stop/{self.index}", json.dumps(dataclasses.asdict(stop))
            )

    def _read_stops(self) -> list[_Stop]:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return [
                _Stop(**json.loads(said))
                for _, said in self._client.key_value_dir_get(f"{_ROOT}/stop/")
            ]
        return []

    def _watch_others(self) -> None:
        while not self._is_over.wait(_POLL_SECONDS):
            stops = self._read_stops()
            if (
                stops
                and not self._is_over.wait(_GRACE_SECONDS)
                and self._ending.acquire(blocking=False)
            ):
                self._print_and_leave(stops[0])

    def _print_and_leave(self, stop: _Stop) -> NoReturn:
        print(f"error: {stop.line}", file=sys.stderr)
        self._leave(stop.code)

    def _leave(self, code: int) -> NoReturn:
        """Ends this process at once: the ordinary way out waits for the others, which may be stuck."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_ROOT}/left/{self.index}", "")
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(f"{_ROOT}/left/")) == self.count:
                    time.sleep(0.2)  # They end just after they say so.
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def join_processes(launch: Launch, code_if_alone: int = 1) -> Processes:
    """Joins the other processes of the run: those that the flags name, or that jax finds by itself.

    jax knows Slurm, Open MPI, Cloud TPU and others by their environment; where it finds none, this
    process is alone. Call before jax first touches a device. If not all come in time, this process
    ends with a line and `code_if_alone`.

    Raises:
        ConfigError: the processes cannot meet as they were told to.
        SystemExit: code 1, with a line; process 0 did not come in time.
    """
    seconds = JOIN_SECONDS if launch.coordinator is None else require_reachable(launch)
    with _exit_after(seconds, launch, code_if_alone):
        try:
            jax.distributed.initialize(
                launch.coordinator,
                launch.num_processes,
                launch.process_id,
                local_device_ids=find_local_device_ids(os.environ),
                # Flags say it all; detection could still contradict them, or warn.
                cluster_detection_method="deactivate" if launch.coordinator else None,
                # jax ends the process with an abort and a stack trace: be sure to come first.
                initialization_timeout=int(seconds) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            # What jax says when neither flags nor environment name a cluster.
            if launch.coordinator is None and "coordinator_address should be defined" in str(error):
                return Processes()
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            # Such as a Kubernetes that lets nobody read its pods: many lines.
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"cannot join the other processes: {reason}: give --coordinator, --num_processes "
                "and --process_id"
            ) from error
    state = distributed.global_state
    if state.num_processes == 1:
        return Processes()
    # Ours alone from here on: Orbax asks it about steps, in between (see `Processes.is_stopping`).
    preemption, state.preemption_sync_manager = state.preemption_sync_manager, None
    return Processes(state.process_id, state.num_processes, state.client, preemption)


def find_local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs of a node for its only Slurm task, which jax would give the first one alone;

    None leaves it to jax.
    """
    tasks, nodes = environment.get("SLURM_NTASKS"), environment.get("SLURM_STEP_NUM_NODES")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if (
        "JAX_LOCAL_DEVICE_IDS" in environment
        or not gpus.isdigit()
        or tasks is None
        or tasks != nodes
    ):
        return None
    return list(range(int(gpus)))


@contextlib.contextmanager
def _exit_after(seconds: float, launch: Launch, code: int) -> Iterator[None]:
    """Ends the process with a line and `code` if the block takes longer, even where it never
    returns to Python.
    """

    def give_up() -> None:
        scheduler = find_scheduler()
        origin = (
            f"those of {scheduler.name}" if scheduler else "those that jax found in the environment"
        )
        wanted = f"{launch.num_processes} at {launch.coordinator}" if launch.coordinator else origin
        print(
            f"error: not all processes of the run ({wanted}) came within {seconds:.0f} s: see what "
            "each printed, and "
            f"that every one was started with an id of its own{proxy_hint()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _describe(error: BaseException) -> _Stop:
    if isinstance(error, ConfigError):
        return _Stop(str(error), 2)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return _Stop(
            str(error.code).removeprefix("error: ") if code == 1 else f"exit code {code}", code
        )
    if isinstance(error, KeyboardInterrupt):
        return _Stop("interrupted", 130)
    first, *_ = str(error).splitlines() or [""]
    return _Stop(f"{type(error).__name__}: {first}", 1)


def _last_part(key: str) -> int:
    return int(key.rpartition("/")[2])
