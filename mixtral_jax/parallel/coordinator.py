"""Where the processes of a run meet: the coordinator's address, and what a scheduler says about the
processes.

Finds, before jax tries, what jax would only wait for: jax ends a process that cannot join others
with an abort, minutes later. Knows no jax.
"""

import dataclasses
import ipaddress
import os
import re
import socket
import sys
import time
from collections.abc import Mapping

from mixtral_jax.config import ConfigError, require

# Hosts of a pod start minutes apart: images are pulled, nodes come up. On one machine nothing takes
# that long.
JOIN_SECONDS = 300.0
LOOPBACK_JOIN_SECONDS = 60.0
LOOPBACK_PORT_SECONDS = 20.0
_PATIENCE_SECONDS = 10.0  # of a silent wait


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the command line says about the processes of a run: all three, or none for jax to find
    them itself.

    Raises:
        ConfigError: one without the others, an address without host or port, an id outside the
            processes.
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
            "--coordinator, --num_processes and --process_id are given together",
        )
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        parse_address(self.coordinator)
        require(self.num_processes >= 1, f"--num_processes={self.num_processes} must be at least 1")
        require(
            0 <= self.process_id < self.num_processes,
            f"--process_id={self.process_id} must lie in 0 ... {self.num_processes - 1}, as "
            "--num_processes="
            f"{self.num_processes} says",
        )


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a scheduler tells its processes;

    `num_machines` and `num_processes` are None where it does not say.
    """

    name: str
    num_machines: int | None
    num_processes: int | None


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, where HOST may be an IPv6 address in brackets.

    Raises:
        ConfigError: there is no host, no port, or the port is no number from 1 to 65535.
    """
    form = f"--coordinator={coordinator} must be HOST:PORT, as node0:8476 or [::1]:8476"
    host, colon, port = coordinator.rpartition(":")
    require(colon and host, form)
    require(":" not in host or (host.startswith("[") and host.endswith("]")), form)
    require(port.isascii() and port.isdigit(), f"{form}: the port {port!r} is no number")
    require(0 < int(port) < 2**16, f"{form}: the port {port} must lie in 1 ... 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine on every machine: localhost, 127.*, ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_scheduler(environment: Mapping[str, str] = os.environ) -> Scheduler | None:
    """The scheduler that started this process, by the variables that it sets;

    None where there is none.
    """

    def number(name: str) -> int | None:
        value = environment.get(name, "")
        return int(value) if re.fullmatch("[0-9]+", value) else None

    if "SLURM_JOB_ID" in environment:
        nodes = number("SLURM_STEP_NUM_NODES") or number("SLURM_JOB_NUM_NODES")
        return Scheduler("Slurm", nodes, number("SLURM_NTASKS"))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        size, here = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
        return Scheduler("Open MPI", -(-size // here) if size and here else None, size)
    if "TPU_WORKER_HOSTNAMES" in environment:
        hosts = len(environment["TPU_WORKER_HOSTNAMES"].split(","))
        return Scheduler("Cloud TPU", hosts, hosts)
    if (
        "JOB_COMPLETION_INDEX" in environment
    ):  # Of an indexed Job: a pod an index, how many it does not say.
        return Scheduler("Kubernetes", None, (number("JOB_COMPLETION_INDEX") or 0) + 1)
    return None


def require_reachable(launch: Launch) -> float:
    """Makes sure that this process can meet the others where `launch` says.

    Process 0 finds the port free; the others wait until something listens there, and say so on
    standard error.

    Returns:
        How long the processes may wait for each other from here on, in seconds.

    Raises:
        ConfigError: the coordinator is this machine's loopback but the processes are not all on one
            machine, or the port is taken. It would be waited for in vain.
        SystemExit: code 1, with a line; nobody listened within the time that hosts may need to
            start.
    """
    assert launch.coordinator is not None
    host, port = parse_address(launch.coordinator)
    loopback = is_loopback(host)
    if loopback and launch.num_processes != 1:
        _refuse_loopback_over_machines(launch.coordinator, find_scheduler())
    if launch.process_id == 0:
        _require_free(port)
        return LOOPBACK_JOIN_SECONDS if loopback else JOIN_SECONDS
    seconds = LOOPBACK_PORT_SECONDS if loopback else JOIN_SECONDS
    reason = wait_for_port(host, port, seconds)
    if reason and loopback:
        raise ConfigError(
            f"--coordinator={launch.coordinator} is this machine's own loopback, and no process 0 "
            "listened on "
            f"{socket.gethostname()} within {seconds:.0f} s: give a HOST:PORT of process 0's "
            "machine that all can "
            "reach, or start process 0 here"
        )
    if reason:
        raise SystemExit(
            f"error: process {launch.process_id} on {socket.gethostname()} did not reach "
            "--coordinator="
            f"{launch.coordinator} within {seconds:.0f} s ({reason}): process 0 must run on that "
            "host, and the port "
            "be open to this one"
        )
    return LOOPBACK_JOIN_SECONDS if loopback else JOIN_SECONDS


def wait_for_port(host: str, port: int, seconds: float) -> str | None:
    """Returns None once something listens there, or after `seconds` the last reason why it could
    not be reached.
    """
    start, has_spoken = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return None
        except OSError as error:
            reason = str(error)
        waited = time.monotonic() - start
        if waited > seconds:
            return reason
        if waited > _PATIENCE_SECONDS and not has_spoken:
            has_spoken = True
            print(
                f"waiting up to {seconds:.0f} s for process 0 at {host}:{port} ({reason}) ...",
                file=sys.stderr,
            )
        time.sleep(0.25)


def proxy_hint(environment: Mapping[str, str] = os.environ) -> str:
    """A remark on proxy variables, which gRPC follows and which lead the processes' connections
    astray.
    """
    names = sorted(
        name for name in environment if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy")
    )
    return (
        f"; {', '.join(names)} is set: unset it, or put the coordinator's host in no_proxy"
        if names
        else ""
    )


def _refuse_loopback_over_machines(coordinator: str, scheduler: Scheduler | None) -> None:
    # Pods are machines of their own.
    if scheduler and (scheduler.name == "Kubernetes" or (scheduler.num_machines or 1) > 1):
        raise ConfigError(
            f"--coordinator={coordinator} is each machine's own loopback, but {scheduler.name} "
            "runs this job on "
            "several: give the HOST:PORT of process 0's machine"
            + ("" if scheduler.name == "Kubernetes" else ", or no --coordinator: jax finds it here")
        )


def _require_free(port: int) -> None:
    """Two coordinators can listen on one port, and then the second run ends the first."""
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on port {port} of {socket.gethostname()} "
            f"({error.strerror or error}): is "
            "another run using it? Give --coordinator another port on all processes"
        ) from None
