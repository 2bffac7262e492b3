"""Two real processes of four virtual devices each form one run.

If anything is wrong with one of them, both stop soon, with a clear line.
"""

import json
import signal
import socket
import time

import pytest

from mixtral_jax.parallel.coordinator import LOOPBACK_JOIN_TIMEOUT_SECONDS
from tests.scripts import finish, free_port, lines_of, start, wait_for_step

STEPS = 12
FLAGS = [
    f"--config.train.num_steps={STEPS}",
    "--config.train.eval_every=6",
    "--config.optimizer.learning_rate=3e-4",
]
pytestmark = pytest.mark.runs

# Logs the files that Python opens for writing or creates, to see which process writes what.
AUDIT = """
import os, sys

def note(event, arguments):
    is_open = event == "open" and isinstance(arguments[0], str)
    if is_open and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = arguments[0]
    elif event in ("os.mkdir", "os.rename"):
        path = os.fsdecode(arguments[event == "os.rename"])
    else:
        return
    if path.startswith(os.environ["AUDITED"]):
        os.write(3, (path + "\\n").encode())
os.dup2(os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 3)
sys.addaudithook(note)
"""


def start_two(folder, workdir, *flags, extra=((), ()), places=(None, None), **options):
    coordinator = f"--coordinator=localhost:{free_port()}"
    return [
        start(
            folder,
            *FLAGS,
            "--config.mesh.cpu_devices=4",
            f"--workdir={workdir}",
            coordinator,
            "--num_processes=2",
            f"--process_id={index}",
            *flags,
            *extra[index],
            place=places[index],
            AUDIT_LOG=str(folder / f"written-{index}"),
            **options,
        )
        for index in range(2)
    ]


def finish_two(processes):
    return [finish(process) for process in processes]


@pytest.fixture(scope="module")
def one(folder):
    code, _, errors = finish(
        start(folder, *FLAGS, "--config.mesh.cpu_devices=8", f"--workdir={folder / 'one'}")
    )
    assert code == 0, errors
    return lines_of(folder / "one")


@pytest.fixture(scope="module")
def two(folder):
    """The workdir of a run of two processes, which is stopped twice and then runs to its end.

    SIGTERM goes to both processes during the run, and then to one while it starts.
    """
    (folder / "audit").mkdir()
    (folder / "audit" / "sitecustomize.py").write_text(AUDIT)
    workdir = folder / "two"
    audited = {"PYTHONPATH": f"{folder / 'audit'}", "AUDITED": str(workdir)}
    processes = start_two(folder, workdir, **audited)
    wait_for_step(processes[0], workdir / "metrics.jsonl", 3)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ends = finish_two(processes)
    assert [code for code, _, _ in ends] == [75, 75], ends
    stopped_after = lines_of(workdir)[-1]["step"]
    assert 3 <= stopped_after < STEPS - 1
    processes = start_two(folder, workdir, **audited)
    assert processes[0].stdout.readline().startswith("workdir")
    processes[1].send_signal(signal.SIGTERM)
    ends = finish_two(processes)
    assert [code for code, _, _ in ends] == [75, 75], ends
    # The signal may arrive while the step compiles, and then one step runs.
    before, stopped_after = stopped_after, lines_of(workdir)[-1]["step"]
    assert stopped_after - before in (0, 1)
    ends = finish_two(start_two(folder, workdir, **audited))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert f"resuming after step {stopped_after} of {STEPS}" in ends[0][1]
    return workdir


def test_two_processes_give_the_losses_and_batches_of_one(one, two):
    both = lines_of(two)
    assert (
        [line["step"] for line in both]
        == [line["step"] for line in one]
        == list(range(1, STEPS + 1))
    )
    assert [line["batch_hash"] for line in both] == [line["batch_hash"] for line in one]
    for name in ("loss", "load_balance_loss", "router_z_loss", "eval/loss"):
        expected = [line[name] for line in one if name in line]
        assert [line[name] for line in both if name in line] == pytest.approx(expected, rel=1e-5), (
            name
        )


def test_one_process_alone_writes_what_is_written_once(folder, two):
    written = [(folder / f"written-{index}").read_text().splitlines() for index in range(2)]
    outside = [[path for path in paths if "/checkpoints" not in path] for paths in written]
    for name in ("config.json", "tokenizer.model", "metrics.jsonl"):
        assert any(path.endswith(name) for path in outside[0]), name
    assert outside[1] == []


def test_different_configs_stop_both_and_name_the_keys(folder):
    start_time = time.monotonic()
    wrong = ("--config.mesh.expert=4", "--config.optimizer.learning_rate=0.5")
    ends = finish_two(start_two(folder, folder / "never", extra=((), wrong)))
    for code, _, errors in ends:
        assert code == 2, errors
        assert errors.startswith("error: the processes have different configs: ")
        assert "mesh.expert=None on process 0, 4 on process 1" in errors
        assert "optimizer.learning_rate=0.0003 on process 0, 0.5 on process 1" in errors
        assert errors.strip().count("\n") == 0
    assert time.monotonic() - start_time < 60
    assert not (folder / "never").exists()


def test_a_wrong_command_on_one_ends_the_other_before_it_has_waited_long(folder):
    start_time = time.monotonic()
    ends = finish_two(start_two(folder, folder / "never", extra=((), ("--config.train.steps=4",))))
    assert [code for code, _, _ in ends] == [2, 2], ends
    reason = "unknown config key train.steps"
    assert ends[1][2].startswith(f"error: {reason}")
    assert ends[0][2].startswith(f"error: process 1 on {socket.gethostname()} stopped: {reason}")
    assert all(errors.strip().count("\n") == 0 for _, _, errors in ends)
    assert time.monotonic() - start_time < LOOPBACK_JOIN_TIMEOUT_SECONDS


def test_an_error_on_one_process_stops_the_other_with_its_reason(folder):
    """The path is relative, and the second process runs in a folder without the text."""
    (folder / "elsewhere").mkdir()
    ends = finish_two(
        start_two(
            folder,
            folder / "half",
            "--config.data.path=text.txt",
            places=(folder, folder / "elsewhere"),
        )
    )
    assert [code for code, _, _ in ends] == [2, 2], ends
    reason = "data.path=text.txt does not exist"
    assert ends[1][2].startswith(f"error: {reason}")
    assert ends[0][2].startswith(f"error: process 1 on {socket.gethostname()} stopped: {reason}")


def test_a_taken_port_is_refused_before_it_ends_another_run(folder):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, _, errors = finish(
            start(folder, f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0")
        )
    assert code == 2
    assert f"port {port}" in errors
    assert "another run" in errors


def test_doctor_of_two_processes_shows_both_as_json(folder):
    processes = start_two(
        folder, folder / "checked", program=("-m", "mixtral_jax", "doctor", "--json")
    )
    ends = finish_two(processes)
    assert [code for code, _, _ in ends] == [0, 0], ends
    report = json.loads(ends[0][1])
    assert ends[1][1] == ""
    assert [row["num_devices"] for row in report["processes"]] == [4, 4]
    assert report["mesh"]["expert"] == 8
    assert report["problems"] == []
    assert report["checkpoint_bytes"] > 0
    assert not (folder / "checked").exists()
