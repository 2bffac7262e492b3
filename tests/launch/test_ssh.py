"""launch/ssh.sh, with an ssh that runs its command on this machine."""

import json
import signal
import sys
import time

import pytest

from tests.scripts import ROOT, environment, free_port, write_text

SSH = """
while [ "${1#-}" != "$1" ]; do shift 2; done
echo "$1" >>"$0.hosts"; shift
cd / && exec sh -c "$*"
"""


@pytest.fixture
def two_hosts(kit):
    (kit.folder / "hosts").write_text("# the first is process 0\nuser@localhost\n\n127.0.0.1\n")
    kit.program("ssh", SSH)
    return kit


def test_each_host_gets_one_process_and_the_same_coordinator(two_hosts):
    code, _, errors = two_hosts.run(
        "ssh.sh", "hosts", str(two_hosts.ends_with(0)), "a b", "$HOME", PORT="1234"
    )
    assert code == 0, errors
    for index in range(2):
        flags = f"--coordinator=localhost:1234 --num_processes=2 --process_id={index}"
        assert two_hosts.calls(index) == [f"a b $HOME {flags}"]
    assert sorted((two_hosts.bin / "ssh.hosts").read_text().split()) == [
        "127.0.0.1",
        "user@localhost",
    ]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("codes", "code", "starts"), [((75, 75, 0), 0, 3), ((75, 2), 2, 2), ((2,), 2, 1), ((1,), 1, 1)]
)
def test_75_starts_all_again_and_nothing_else_does(two_hosts, codes, code, starts):
    assert two_hosts.run("ssh.sh", "hosts", str(two_hosts.ends_with(*codes)))[0] == code
    assert [len(two_hosts.calls(index)) for index in range(2)] == [starts, starts]


def test_a_signal_reaches_the_processes_and_is_no_reason_to_start_again(two_hosts):
    work = two_hosts.program(
        "work", f'trap "exit 75" TERM; touch "{two_hosts.folder}/up$$"; while :; do sleep 0.1; done'
    )
    process = two_hosts.start("ssh.sh", "hosts", str(work))
    deadline = time.monotonic() + 60
    while len(list(two_hosts.folder.glob("up*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert len(list(two_hosts.folder.glob("up*"))) == 2


def test_one_that_fails_ends_those_that_would_wait_for_it(two_hosts):
    work = two_hosts.program("work", 'case "$*" in *process_id=1) exit 127;; esac; exec sleep 300')
    start = time.monotonic()
    assert two_hosts.run("ssh.sh", "hosts", str(work), GRACE_SECONDS="1")[0] == 127
    assert time.monotonic() - start < 60


def test_wrong_usage_is_2(two_hosts):
    assert two_hosts.run("ssh.sh")[0] == 2
    assert two_hosts.run("ssh.sh", "nowhere", "true")[0] == 2
    (two_hosts.folder / "empty").write_text("# nobody\n")
    assert two_hosts.run("ssh.sh", "empty", "true")[0] == 2


@pytest.mark.runs
def test_two_real_processes_meet(two_hosts):
    write_text(two_hosts.folder)
    command = [
        sys.executable,
        "-m",
        "mixtral_jax",
        "doctor",
        "--json",
        f"--config={ROOT / 'configs/pretrain/tiny.py'}",
        "--config.mesh.cpu_devices=4",
        f"--workdir={two_hosts.folder / 'run'}",
    ]
    variables = environment(two_hosts.folder)
    variables = {name: variables[name] for name in ("XDG_CACHE_HOME", "PYTHONPATH")}
    code, output, errors = two_hosts.run(
        "ssh.sh", "hosts", *command, PORT=str(free_port()), **variables
    )
    assert code == 0, errors
    assert [row["index"] for row in json.loads(output)["processes"]] == [0, 1]
