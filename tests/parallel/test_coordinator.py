"""How processes meet: a launch that cannot work is refused at once, with the value and the fix."""

import os
import socket
import subprocess
import sys
import time

import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.parallel import coordinator, processes
from mixtral_jax.parallel.coordinator import (
    Launch,
    is_loopback,
    parse_address,
    require_reachable,
)


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (("node0", 2, 0), ["--coordinator=node0", "HOST:PORT"]),
        ((":8476", 2, 0), ["--coordinator=:8476", "HOST:PORT"]),
        (("::1:8476", 2, 0), ["HOST:PORT", "[::1]:8476"]),
        (("node0:port", 2, 0), ["'port' is not a number"]),
        (("node0:70000", 2, 0), ["70000", "65535"]),
        (("node0:8476", 2, 2), ["--process_id=2", "0 ... 1"]),
        (("node0:8476", 2, -1), ["--process_id=-1"]),
        (("node0:8476", 0, 0), ["--num_processes=0", "at least 1"]),
        (("node0:8476", 2, None), ["given together"]),
        ((None, 2, 0), ["given together"]),
    ],
)
def test_a_wrong_launch_is_refused_by_name(launch, words):
    with pytest.raises(ConfigError) as error:
        Launch(*launch)
    for word in words:
        assert word in str(error.value)


def test_addresses_are_host_and_port():
    assert parse_address("node0:8476") == ("node0", 8476)
    assert parse_address("[2001:db8::1]:80") == ("2001:db8::1", 80)


def test_loopback_is_known_by_every_name():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("node0", "10.0.0.1", "2001:db8::1")))


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"},
        {"JOB_COMPLETION_INDEX": "1"},
    ],
)
def test_a_loopback_coordinator_over_several_machines_is_refused_at_once(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1234 is each machine's own loopback"):
        require_reachable(Launch("127.0.0.1:1234", 2, 1))


def test_a_loopback_without_process_0_is_given_up_soon(monkeypatch):
    monkeypatch.setattr(coordinator, "LOOPBACK_PORT_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="process 0 did not listen on") as error:
        require_reachable(Launch(f"localhost:{_closed_port()}", 2, 1))
    assert socket.gethostname() in str(error.value)


def test_a_coordinator_out_of_reach_ends_with_code_1_and_the_reason(monkeypatch):
    """The code is not 2: a host that comes up late is no mistake, and a launcher may try again."""
    monkeypatch.setattr(coordinator, "JOIN_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(
        SystemExit,
        match=r"error: process 1 on .* did not reach --coordinator=nowhere\.invalid:8476",
    ):
        require_reachable(Launch("nowhere.invalid:8476", 2, 1))


def test_a_cluster_that_jax_cannot_ask_is_one_line_with_the_flags_that_do_without(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError(
            "Kubernetes API Error: 403 - Forbidden\nIt appears that the service account\nmay not"
        )

    monkeypatch.setattr(processes.jax.distributed, "initialize", refuse)
    with pytest.raises(
        ConfigError, match=r"403 - Forbidden It appears .* may not: give --coordinator"
    ) as error:
        processes.join_processes(Launch())
    assert "\n" not in str(error.value)


@pytest.mark.runs
def test_processes_that_never_come_end_the_wait_with_a_line():
    """jax itself would abort with a stack trace."""
    program = (
        "from mixtral_jax.parallel import coordinator, processes\n"
        "coordinator.LOOPBACK_JOIN_TIMEOUT_SECONDS = 2.0\n"
        f"processes.join_processes(coordinator.Launch('localhost:{_closed_port()}', 2, 0))"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: not all processes of the run (2 at localhost:")
    assert done.stderr.strip().count("\n") == 0
    assert time.monotonic() - start < 60


def _closed_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
