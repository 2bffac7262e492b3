"""Where the processes of a run meet: the address of the coordinator.

jax waits minutes for processes that can never meet, and then aborts with a stack trace. The checks
here run before jax tries, and end the process with one clear line instead. They do not import jax.
"""

import contextlib
import dataclasses
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from mixtral_jax.config import ConfigError, require
from mixtral_jax.parallel.schedulers import Scheduler, find_scheduler

# Hosts of a pod start minutes apart, because images are pulled and nodes come up. Processes of one
# machine (a loopback coordinator) start together.
JOIN_TIMEOUT_SECONDS = 300.0
LOOPBACK_JOIN_TIMEOUT_SECONDS = 60.0
LOOPBACK_PORT_TIMEOUT_SECONDS = 20.0
_SILENT_WAIT_SECONDS = 10.0
_CONNECT_TIMEOUT_SECONDS = 5.0
_CONNECT_INTERVAL_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Launch:
    """The process flags of the command line: all three, or none if jax is to find the processes.

    Raises:
        ConfigError: some flags are missing, the address lacks a host or a port, or the id is not
            below the number of processes.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        given = [
            value is not None for value in (self.coordinator, self.num_processes, self.process_id)
        ]
        require(
            all(given) or not any(given),
            "--coordinator, --num_processes and --process_id must be given together",
        )
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        parse_address(self.coordinator)
        require(self.num_processes >= 1, f"--num_processes={self.num_processes} must be at least 1")
        require(
            0 <= self.process_id < self.num_processes,
            f"--process_id={self.process_id} must lie in 0 ... {self.num_processes - 1}, because "
            f"--num_processes={self.num_processes}",
        )


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, where HOST may be an IPv6 address in brackets.

    Raises:
        ConfigError: the host or the port is missing, or the port is not a number from 1 to 65535.
    """
    form = f"--coordinator={coordinator} must be HOST:PORT, such as node0:8476 or [::1]:8476"
    host, colon, port = coordinator.rpartition(":")
    require(colon and host, form)
    require(":" not in host or (host.startswith("[") and host.endswith("]")), form)
    require(port.isascii() and port.isdigit(), f"{form}: the port {port!r} is not a number")
    require(0 < int(port) < 2**16, f"{form}: the port {port} must lie in 1 ... 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """True if `host` means "this machine" on every machine: localhost, 127.*, ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_reachable(launch: Launch) -> float:
    """Checks that this process can meet the others at `launch.coordinator`.

    Process 0 checks that the port is free. The others wait until something listens there; after
    10 s they say on standard error that they are waiting.

    Returns:
        The timeout, in seconds, for all processes to join once the coordinator is reached.

    Raises:
        ConfigError: the coordinator is a loopback address but the processes run on several
            machines, or the port is taken.
        SystemExit: code 1, with a line. Nothing listened within the time that hosts may need to
            start.
    """
    assert launch.coordinator is not None
    host, port = parse_address(launch.coordinator)
    loopback = is_loopback(host)
    if loopback and launch.num_processes != 1:
        _refuse_loopback_over_machines(launch.coordinator, find_scheduler())
    if launch.process_id == 0:
        _require_free(port)
        return LOOPBACK_JOIN_TIMEOUT_SECONDS if loopback else JOIN_TIMEOUT_SECONDS
    seconds = LOOPBACK_PORT_TIMEOUT_SECONDS if loopback else JOIN_TIMEOUT_SECONDS
    reason = wait_for_port(host, port, seconds)
    if reason and loopback:
        raise ConfigError(
            f"--coordinator={launch.coordinator} is this machine's own loopback, but process 0 did "
            f"not listen on {socket.gethostname()} within {seconds:.0f} s: give a HOST:PORT of "
            "process 0's machine that all others can reach, or start process 0 here"
        )
    if reason:
        raise SystemExit(
            f"error: process {launch.process_id} on {socket.gethostname()} did not reach "
            f"--coordinator={launch.coordinator} within {seconds:.0f} s ({reason}): process 0 must "
            "run on that host, and its port must be open to this host"
        )
    return LOOPBACK_JOIN_TIMEOUT_SECONDS if loopback else JOIN_TIMEOUT_SECONDS


def wait_for_port(host: str, port: int, seconds: float) -> str | None:
    """Waits until something listens on the port.

    Returns:
        None once a connection succeeds, or after `seconds` the reason why the last one failed.
    """
    start, has_spoken = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_SECONDS).close()
            return None
        except OSError as error:
            reason = str(error)
        waited = time.monotonic() - start
        if waited > seconds:
            return reason
        if waited > _SILENT_WAIT_SECONDS and not has_spoken:
            has_spoken = True
            print(
                f"waiting up to {seconds:.0f} s for process 0 at {host}:{port} ({reason}) ...",
                file=sys.stderr,
            )
        time.sleep(_CONNECT_INTERVAL_SECONDS)


def _proxy_hint() -> str:
    """A hint for an error message if proxy variables are set, otherwise an empty string.

    gRPC sends the connections between the processes through a proxy that these variables name.
    """
    names = sorted(
        name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy")
    )
    if not names:
        return ""
    return f"; {', '.join(names)} is set: unset it, or put the coordinator's host in no_proxy"


@contextlib.contextmanager
def exit_after(seconds: float, launch: Launch, code: int) -> Iterator[None]:
    """Ends the process with a line and `code` if the block takes longer than `seconds`.

    A thread does this, so it also works if the block never returns to Python.
    """

    def give_up() -> None:
        scheduler = find_scheduler()
        source = scheduler.name if scheduler else "the environment, as jax reads it"
        expected = (
            f"{launch.num_processes} at {launch.coordinator}" if launch.coordinator else source
        )
        print(
            f"error: not all processes of the run ({expected}) joined within {seconds:.0f} s: see "
            "what each of them printed, and check that each was started with its own process id"
            f"{_proxy_hint()}",
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


def _refuse_loopback_over_machines(coordinator: str, scheduler: Scheduler | None) -> None:
    # Each pod counts as a machine: it has its own loopback.
    if scheduler and (scheduler.name == "Kubernetes" or (scheduler.num_machines or 1) > 1):
        raise ConfigError(
            f"--coordinator={coordinator} is each machine's own loopback, but {scheduler.name} "
            "runs this job on several machines: give the HOST:PORT of process 0's machine"
            + (
                ""
                if scheduler.name == "Kubernetes"
                else ", or leave --coordinator out: jax finds it"
            )
        )


def _require_free(port: int) -> None:
    """Refuses a used port: of two runs on one port, the second would end the first."""
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on port {port} of {socket.gethostname()} "
            f"({error.strerror or error}): another run may be using it; give --coordinator another "
            "port on all processes"
        ) from None
