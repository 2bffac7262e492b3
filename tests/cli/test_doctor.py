"""The doctor verb, and each of its checks on a machine that is wrong in one thing."""

import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from mixtral_jax.cli.doctor import show
from mixtral_jax.cli.flags import parse_run_flags
from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.agreement import introduce
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.schedulers import Scheduler
from mixtral_jax.runs import checkup
from mixtral_jax.runs.examine import examine
from mixtral_jax.runs.workdir import open_workdir
from tests.cases import mesh_of, small_config

ROOT = Path(__file__).parents[2]
GIB = 2**30
# The model of configs/pretrain/tiny.py: 4 layers of hidden size 128, 8 experts, 2048 tokens.
LAYERS, D, F, V, EXPERTS = 4, 128, 256, 2048, 8
ATTENTION = 2 * D * 4 * 32 + 2 * D * 2 * 32  # 4 query heads and 2 of keys and values, of 32 each.
EXPERT_PARAMETERS = LAYERS * EXPERTS * 3 * D * F
NORMS = LAYERS * 2 * D + D
ROUTERS = LAYERS * D * EXPERTS
PARAMETERS = EXPERT_PARAMETERS + LAYERS * ATTENTION + ROUTERS + NORMS + 2 * V * D


def doctor(*flags):
    command = [sys.executable, "-m", "mixtral_jax", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_doctor_finds_nothing_wrong_with_the_default_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkup, "time_sum", lambda mesh: 0.0125)
    workdir = tmp_path / "run"
    flags = parse_run_flags([], description="", default_config="pretrain/tiny.py")
    report = examine(flags.config, workdir, Processes())
    assert report["problems"] == []
    (process,) = report["processes"]
    assert (process["pid"], process["num_devices"], process["platform"]) == (os.getpid(), 8, "cpu")
    assert process["workdir"] == str(workdir)
    assert report["mesh"] == {axis: 8 if axis == "expert" else 1 for axis in MESH_AXES}
    assert report["experts"] == [f"expert {number} on device {number}" for number in range(8)]
    assert report["parameters"] == PARAMETERS
    # Parameters and two moments in float32; what counts steps and load is below a kilobyte.
    assert 0 <= report["checkpoint_bytes"] - 3 * 4 * PARAMETERS < 1024
    # Norms and routers are on every device; all else is cut over the eight.
    here = NORMS + ROUTERS + V * D + (PARAMETERS - NORMS - ROUTERS - V * D) // 8
    assert 0 <= report["state_bytes_per_device"] - 3 * 4 * here < 1024
    assert report["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, abs=GIB)
    assert report["versions"]["jax"] == jax.__version__
    assert report["cache"] == str(tmp_path / "cache" / "mixtral_jax")
    assert {name: choice["name"] for name, choice in report["kernels"].items()} == {
        "attention": "xla",
        "matmul": "blocks",
        "transport": "all_gather",
        "remat": "none",
    }

    shown = io.StringIO()
    show(report, shown)
    lines = shown.getvalue()
    for words in (
        "8 x cpu",
        "expert=8",
        "expert 7 on device 7",
        f"jax {jax.__version__}",
        "blocks (",
        "all_gather (",
        f"parameters  {PARAMETERS:,}; with the optimizer's state "
        f"{report['state_bytes_per_device'] / 2**20:.2f} MiB a device",
        "a sum over them takes 12.5 ms",
        "GiB free",
        f"a checkpoint takes {report['checkpoint_bytes'] / 2**20:.2f} MiB",
        "no problem found",
    ):
        assert words in lines, words
    assert not workdir.exists()


def test_doctor_lists_every_problem_with_its_fix(tmp_path):
    (tmp_path / "file").touch()
    done = doctor(
        "--json",
        f"--workdir={tmp_path / 'file' / 'run'}",
        "--config.data.path=nowhere",
        "--config.data.tokenizer=nowhere.model",
        "--config.mesh.expert=3",
    )
    assert done.returncode == 2, done.stderr
    problems = json.loads(done.stdout)["problems"]
    for words in ("cannot be written", "data.path=nowhere", "nowhere.model", "expert=3"):
        assert any(words in problem["what"] for problem in problems), words
    assert all(problem["fix"] for problem in problems)


def test_doctor_looks_at_the_base_of_a_tuning_and_at_what_cannot_be_trained(tmp_path):
    (tmp_path / "empty").mkdir()
    for base, words in (
        ("nowhere", "finetune.base=nowhere is no folder"),
        (tmp_path / "empty", "has no weights"),
    ):
        found = []
        checkup.fit_base(small_config(finetune__base=str(base)), found, is_shown=True)
        assert words in found[0].what and found[0].fix
    found = []
    assert checkup.fit_base(small_config(), found, is_shown=True) == small_config() and not found
    checkup.fit_base(small_config(model__param_dtype="float16"), found, is_shown=True)
    assert "param_dtype=float16" in found[0].what and "use float32" in found[0].fix


class OneOfThree(Processes):
    """Process 0 of three, of which the last sees nothing of what the others see."""

    def __init__(self):
        super().__init__(0, 3)

    def share(self, name, value, seconds=None):
        return [value, value, False if name == "workdir seen" else value]


def test_a_workdir_that_one_process_does_not_see_is_a_problem_and_stops_a_run(tmp_path):
    members = introduce(OneOfThree(), small_config(), tmp_path / "new")
    (problem,) = checkup.check_workdir(tmp_path / "new", OneOfThree(), members)
    assert problem.what == f"--workdir={tmp_path / 'new'} of process 0 is not seen by process 2"
    assert "storage that all processes share" in problem.fix
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"not seen by process 2: name a folder"):
        open_workdir(tmp_path / "new", small_config(), OneOfThree())


def test_several_processes_need_a_workdir(tmp_path):
    members = introduce(OneOfThree(), small_config(), None)
    (problem,) = checkup.check_workdir(None, OneOfThree(), members)
    assert problem.what == "--workdir is needed with several processes"
    assert problem.fix


def test_a_scheduler_that_started_more_processes_than_met_is_a_problem():
    alone = Processes()
    assert checkup.check_launch(alone, None) == []
    assert checkup.check_launch(alone, Scheduler("Slurm", 1, 1)) == []
    (problem,) = checkup.check_launch(alone, Scheduler("Slurm", 4, 4, "start it by srun"))
    assert (problem.what, problem.fix) == (
        "Slurm says there are 4 processes, but 1 met",
        "start it by srun",
    )
    assert checkup.check_launch(Processes(count=4), Scheduler("Kubernetes", None, 2)) == []
    assert checkup.check_launch(alone, Scheduler("Kubernetes", None, 2))


@pytest.mark.parametrize(
    ("files", "platform", "num_local", "variables", "words"),
    [
        ([], "cpu", 1, {}, None),
        (["nvidia0", "nvidiactl"], "cpu", 1, {}, "cuda"),
        (["accel0"], "cpu", 1, {}, "tpu"),
        (["nvidia0"], "cpu", 1, {"JAX_PLATFORMS": "cpu"}, None),
        (["nvidia0", "nvidia1", "nvidiactl"], "gpu", 2, {}, None),
        (["nvidia0", "nvidia1", "nvidiactl"], "gpu", 1, {}, "JAX_LOCAL_DEVICE_IDS"),
        (["nvidia0", "nvidia1"], "gpu", 1, {"CUDA_VISIBLE_DEVICES": "1"}, None),
    ],
)
def test_accelerators_left_unused_are_a_problem(
    tmp_path, files, platform, num_local, variables, words
):
    for name in files:
        (tmp_path / name).touch()
    found = checkup.check_accelerators(platform, num_local, True, variables, tmp_path)
    assert len(found) == (words is not None)
    assert not found or words in found[0].fix


def test_state_must_fit_a_device():
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 16 * GIB}

    assert checkup.check_memory(GIB, Device()) == []
    assert "mesh.fsdp" in checkup.check_memory(20 * GIB, Device())[0].fix


def test_an_unwritable_cache_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (problem,) = checkup.check_data(small_config())
    assert "XDG_CACHE_HOME" in problem.fix


def test_a_sum_over_all_devices_is_timed(monkeypatch):
    ticks = iter([10.0, 10.25])
    monkeypatch.setattr(checkup, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    assert checkup.time_sum(mesh_of(data=2, expert=4)) == 0.25


def test_devices_that_add_up_wrongly_are_noticed(monkeypatch):
    monkeypatch.setattr(jax.numpy, "sum", lambda numbers: numbers.max())
    with pytest.raises(AssertionError):
        checkup.time_sum(mesh_of(data=2, expert=4))
