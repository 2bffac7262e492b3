"""The processes of a run: how they join, exchange values, and end together.

jax's coordination service, which process 0 hosts, carries the messages. It works before any device
is touched and while a collective hangs. A process that stops tells the others why, and they stop
within seconds. Without these messages they would wait until jax's heartbeat timeout, or forever.
`agreement` decides what the processes compare; `coordinator` checks that they can meet.
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
from typing import Any, NoReturn

import jax

# jax has no public way to send a message between processes without devices. Orbax and others use
# this client too.
from jax._src import distributed

from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.coordinator import (
    JOIN_TIMEOUT_SECONDS,
    Launch,
    exit_after,
    require_reachable,
)
from mixtral_jax.parallel.schedulers import find_local_device_ids, require_all_met

# If a process vanishes without a message, jax aborts the others after this time, even while they
# hang in a collective. A host that swaps or migrates may be silent for some tens of seconds.
HEARTBEAT_TIMEOUT_SECONDS = 60
# Timeout of jax's own shutdown. It is rarely used up, because all processes have reached the end by
# then (`Processes.__exit__`).
SHUTDOWN_TIMEOUT_SECONDS = 60
# Added to jax's own timeout for joining, so that our clear message comes before jax's abort.
_JAX_JOIN_MARGIN_SECONDS = 60

_POLL_INTERVAL_SECONDS = 0.5
# How long this process may look for the cause by itself after another process has stopped.
_GRACE_SECONDS = 2.0
# Process 0 hosts the messages, so it waits this long for the others to read the last one.
_FAREWELL_TIMEOUT_SECONDS = 10.0
_FAREWELL_POLL_SECONDS = 0.1
# Process 0 waits this long after all have written that they leave, so that they end before it does.
_EXIT_DELAY_SECONDS = 0.2
_MIN_SHARE_POLL_SECONDS = 0.01
_MAX_SHARE_POLL_SECONDS = 1.0
_ROOT = "mixtral_jax"


@dataclasses.dataclass(frozen=True)
class _Stop:
    """Why a process stopped, in one line for people, and the exit code that all processes use."""

    line: str
    code: int


class Processes:
    """All processes of a run, and the index of this one. Use it as a context around shared work.

    If one process leaves the context with an exception, the others print it and end with the same
    exit code, whatever they are doing. With a single process the context does nothing.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, preemption: Any = None):
        self.index = index
        self.count = count
        self._client = client
        self._preemption = preemption
        self._num_stop_checks = 0
        self._rounds: collections.Counter[str] = collections.Counter()
        self._is_over = threading.Event()
        self._ending = threading.Lock()  # The thread that holds it ends the process.
        self._watch = threading.Thread(target=self._watch_others, name="processes", daemon=True)

    def share(self, name: str, value: Any, seconds: float | None = None) -> list[Any]:
        """Exchanges a value: every process gets the values of all, in the order of the processes.

        Args:
            name: names this exchange. A name may be used again, if all processes use it again.
            value: anything that JSON can hold.
            seconds: the timeout. None waits as long as the other processes live.

        Raises:
            SystemExit: code 1, with a line that names the processes that sent no value in time.
        """
        if self._client is None:
            return [value]
        self._rounds[name] += 1
        folder = f"{_ROOT}/{name}/{self._rounds[name]}/"
        self._client.key_value_set(f"{folder}{self.index}", json.dumps(value))
        start, pause = time.monotonic(), _MIN_SHARE_POLL_SECONDS
        while len(found := self._client.key_value_dir_get(folder)) < self.count:
            if seconds is not None and time.monotonic() - start > seconds:
                silent = sorted(set(range(self.count)) - {_last_part(key) for key, _ in found})
                raise SystemExit(
                    f"error: process {', '.join(map(str, silent))} did not send its {name} within "
                    f"{seconds:.0f} s: see what it printed"
                )
            time.sleep(pause)
            pause = min(2 * pause, _MAX_SHARE_POLL_SECONDS)
        in_order = sorted(found, key=lambda pair: _last_part(pair[0]))
        return [json.loads(text) for _, text in in_order]

    def is_stopping(self) -> bool:
        """True once any process has received SIGTERM.

        The nth call returns the same answer on every process. jax stops all processes at the first
        number that none of them has asked about yet. So the numbers count the calls: they start at
        1 and grow by one, whatever the step, and go on over several runs in one process.
        """
        self._num_stop_checks += 1
        if self._preemption is None:
            return False
        return self._preemption.reached_sync_point(self._num_stop_checks)

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
            # This error is not the cause: for example, a collective failed because another process
            # ended.
            self._print_and_leave(others[0])
        stop = _describe(error)
        self._tell(stop)
        if stop.code == 1 and not isinstance(error, SystemExit):
            traceback.print_exception(error)
            self._leave(stop.code)
        self._print_and_leave(stop)

    def refuse(self, error: ConfigError) -> None:
        """Ends all processes with `error`, which this one has printed already.

        Used if this process was started wrongly. With a single process it returns.
        """
        if self._client is not None:
            stop = _describe(error)
            self._tell(stop)
            self._leave(stop.code)

    def _tell(self, stop: _Stop) -> None:
        stop = _Stop(
            f"process {self.index} on {socket.gethostname()} stopped: {stop.line}", stop.code
        )
        text = json.dumps(dataclasses.asdict(stop))
        # jax raises if process 0 is gone, and the messages with it.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_ROOT}/stop/{self.index}", text)

    def _read_stops(self) -> list[_Stop]:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = self._client.key_value_dir_get(f"{_ROOT}/stop/")
            return [_Stop(**json.loads(text)) for _, text in found]
        return []

    def _watch_others(self) -> None:
        while not self._is_over.wait(_POLL_INTERVAL_SECONDS):
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
        """Ends this process at once. An ordinary exit waits for the others, which may be stuck."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_ROOT}/left/{self.index}", "")
            deadline = time.monotonic() + _FAREWELL_TIMEOUT_SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(f"{_ROOT}/left/")) == self.count:
                    time.sleep(_EXIT_DELAY_SECONDS)
                    break
                time.sleep(_FAREWELL_POLL_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def join_processes(
    launch: Launch, code_if_alone: int = 1, *, requires_all: bool = True
) -> Processes:
    """Joins the other processes of the run, which the flags name or jax finds by itself.

    jax finds them by the environment of Slurm, Open MPI, Cloud TPU and others. If it finds none,
    this process is the only one. Call this before jax first touches a device. If the processes do
    not all join in time, this process prints a line and ends with `code_if_alone`.

    Args:
        requires_all: refuses to go on with fewer processes than a scheduler has started: each of
            them would train by itself.

    Raises:
        ConfigError: the processes cannot meet where the flags or the environment say, or a launcher
            that jax does not know started several.
        SystemExit: code 1, with a line. Process 0 did not listen in time.
    """
    processes = _join(launch, code_if_alone)
    if requires_all and launch.coordinator is None:
        require_all_met(processes.count)
    return processes


def _join(launch: Launch, code_if_alone: int) -> Processes:
    seconds = require_reachable(launch) if launch.coordinator else JOIN_TIMEOUT_SECONDS
    with exit_after(seconds, launch, code_if_alone):
        try:
            jax.distributed.initialize(
                launch.coordinator,
                launch.num_processes,
                launch.process_id,
                local_device_ids=find_local_device_ids(),
                # With flags, jax need not detect a cluster, which could contradict them or warn.
                cluster_detection_method="deactivate" if launch.coordinator else None,
                initialization_timeout=int(seconds) + _JAX_JOIN_MARGIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            # jax says this if neither flags nor environment name a cluster.
            if launch.coordinator is None and "coordinator_address should be defined" in str(error):
                return Processes()
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            # For example, Kubernetes does not allow this pod to list pods. jax prints many lines.
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"cannot join the other processes: {reason}: give --coordinator, --num_processes "
                "and --process_id"
            ) from error
    state = distributed.global_state
    if state.num_processes == 1:
        return Processes()
    # Take the manager away from jax: Orbax would ask it about steps, between our own questions
    # (see `Processes.is_stopping`).
    preemption, state.preemption_sync_manager = state.preemption_sync_manager, None
    return Processes(state.process_id, state.num_processes, state.client, preemption)


def _describe(error: BaseException) -> _Stop:
    if isinstance(error, ConfigError):
        return _Stop(str(error), 2)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        line = str(error.code).removeprefix("error: ") if code == 1 else f"exit code {code}"
        return _Stop(line, code)
    if isinstance(error, KeyboardInterrupt):
        return _Stop("interrupted", 130)
    first, *_ = str(error).splitlines() or [""]
    return _Stop(f"{type(error).__name__}: {first}", 1)


def _last_part(key: str) -> int:
    return int(key.rpartition("/")[2])
