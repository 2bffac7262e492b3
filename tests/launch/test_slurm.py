"""launch/slurm.sbatch, with an srun that runs its command here and a logging scontrol."""

import os
import signal
import time
from pathlib import Path

import pytest

SRUN = """
while [ "${1#-}" != "$1" ]; do echo "$1" >>"$0.flags"; shift; done
shift; exec "$WORK" "$@"
"""


@pytest.fixture
def slurm(kit):
    kit.program("srun", SRUN)
    kit.program("scontrol", 'echo "$@" >"$0.asked"')
    return kit


def submit(slurm, work, *arguments):
    return slurm.run("slurm.sbatch", *arguments, WORK=str(work), SLURM_JOB_ID="77")


def requests(slurm):
    path = slurm.bin / "scontrol.asked"
    return path.read_text().strip() if path.exists() else None


@pytest.mark.parametrize(
    ("code", "request_made"), [(75, "requeue 77"), (0, None), (2, None), (1, None)]
)
def test_75_goes_back_into_the_queue_and_nothing_else_does(slurm, code, request_made):
    ended, _, errors = submit(slurm, slurm.ends_with(code), "train.py", "--workdir=a b")
    assert ended == code, errors
    assert requests(slurm) == request_made
    assert slurm.calls() == ["train.py --workdir=a b"]
    # A process that ends first must not end those that still save.
    assert "--kill-on-bad-exit=0" in (slurm.bin / "srun.flags").read_text()


def test_the_script_outlives_a_signal_until_its_processes_have_saved(slurm):
    ready = slurm.folder / "ready"
    work = slurm.program(
        "work", f'trap "sleep 1; exit 75" TERM; echo $$ >"{ready}"; while :; do sleep 0.1; done'
    )
    process = slurm.start("slurm.sbatch", "train.py", WORK=str(work), SLURM_JOB_ID="77")
    deadline = time.monotonic() + 60
    while not ready.exists() or not ready.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Slurm may signal both the script and its steps.
    for pid in (process.pid, int(ready.read_text())):
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert requests(slurm) == "requeue 77"


def test_one_process_a_node_and_a_warning_before_the_end(slurm):
    text = (Path(__file__).parents[2] / "launch" / "slurm.sbatch").read_text()
    for line in ("#SBATCH --ntasks-per-node=1", "#SBATCH --signal=TERM@120", "#SBATCH --requeue"):
        assert line in text.splitlines()
    assert submit(slurm, slurm.ends_with(0))[0] == 2  # no command
