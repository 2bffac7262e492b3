"""`mixtral-jax ablate` as users run it: stopped and resumed, failing, and split over processes."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.cli import ablate
from mixtral_jax.config import ConfigError
from mixtral_jax.lab.ablation.records import DATA, FAILURE
from mixtral_jax.parallel import processes
from tests import scripts as runs
from tests.cases import cpu_model_maker, mesh_of
from tests.lab.ablations import small_ablation
from tests.scripts import SMALL, finish, lines_of, wait_for_step

pytestmark = pytest.mark.runs

STEPS = 20
ARMS = {"none": {"router.load_balance.weight": 0.0}, "top-1": {"router.num_experts_per_token": 1}}
# Numbers of this size overflow in the first step.
BROKEN = {"broken": {"model.initializer_range": 1e30}, "none": {}}


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Holds two ablation files too."""
    for name, arms in (("good", ARMS), ("broken", BROKEN)):
        entries = {"question": "Which?", "arms": arms, "reference": "none", "seeds": (0, 1)}
        train = f"dict(num_steps={STEPS}, batch_size=8, sequence_length=32)"
        base = f"dict(tiny.get_config(), train={train})"
        (folder / f"{name}.py").write_text(
            "from configs.pretrain import tiny\n\n\ndef get_config():\n    return "
            f"dict({entries!r}, base={base})\n"
        )
    return folder


def flags_of(folder: Path, file: str, name: str) -> list[str]:
    """The flags of an ablation of the small model in the workdir `name`."""
    return [
        f"--config={folder / file}.py",
        f"--workdir={folder / name}",
        "--config.mesh.cpu_devices=1",
        "--config.model.num_layers=1",
        "--config.log.tensorboard=false",
        "--config.train.eval_every=10",
    ]


def start(folder: Path, file: str, name: str, *flags: str) -> subprocess.Popen:
    """Starts an ablation in a process of its own."""
    chosen = flags_of(folder, file, name)
    return runs.start(folder, *chosen, *flags, program=("-m", "mixtral_jax", "ablate"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a verb run in this process, which cannot join others once jax has started."""
    monkeypatch.setattr(processes, "join_processes", lambda launch: processes.Processes())


def ablate_here(folder: Path, name: str, *flags: str) -> int:
    """Runs the ablation `good` in this process, with the flags that `start` gives it."""
    data = f"--config.data.path={folder / 'text.txt'}"
    return ablate.main([*SMALL, data, *flags_of(folder, "good", name), *flags])


def figures_of(workdir: Path) -> dict[str, Any]:
    """Reads results.json without what may differ if the same ablation is run twice."""
    results = json.loads((workdir / "report/results.json").read_text())
    for arm in results["arms"]:
        assert arm.pop("clock")["tokens_per_second_mean"] > 0
    return results | {
        "provenance": {
            name: results["provenance"][name] for name in ("data", "tokenizer", "versions")
        }
    }


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    code, _, errors = finish(start(folder, "good", "unbroken"))
    assert code == 0, errors
    return figures_of(folder / "unbroken")


def test_an_ablation_ends_with_a_table_of_all_arms(folder: Path, unbroken: dict[str, Any]) -> None:
    none, single = unbroken["arms"]
    assert (none["name"], single["name"], none["status"], none["seeds"]) == (
        "none",
        "top-1",
        "done",
        [0, 1],
    )
    assert none["changes"] == ARMS["none"]
    assert single["parameters_active"] < none["parameters_active"] < none["parameters_total"]
    assert single["model_flops_per_step"] < none["model_flops_per_step"]
    assert none["eval_loss_sd"] > 0 and none["max_violation_mean"] > 0
    assert none["eval_loss_difference"] == {"mean": 0, "low": 0, "high": 0, "pairs": 2}
    assert (folder / "unbroken/report/index.html").exists()


def test_every_arm_of_a_seed_sees_the_same_rows_and_every_seed_others(
    folder: Path, unbroken: dict[str, Any]
) -> None:
    hashes = {
        (arm, seed): [
            line["batch_hash"] for line in lines_of(folder / f"unbroken/arms/{arm}/seed-{seed}")
        ]
        for arm in ARMS
        for seed in (0, 1)
    }
    assert len(hashes["none", 0]) == STEPS
    for seed in (0, 1):
        assert hashes["none", seed] == hashes["top-1", seed]
    assert not set(hashes["none", 0]) & set(hashes["none", 1])


def test_a_stopped_ablation_that_two_tasks_resume_repeats_nothing_and_reports_the_same(
    folder: Path, unbroken: dict[str, Any]
) -> None:
    process = start(folder, "good", "stopped")
    wait_for_step(process, folder / "stopped/arms/top-1/seed-0/metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 75, errors
    assert not (folder / "stopped/report").exists()
    assert (folder / "stopped/arms/top-1/seed-0" / DATA).exists()  # Before its end.
    finished = folder / "stopped/arms/none/seed-0/metrics.jsonl"
    before = (finished.stat().st_mtime_ns, finished.read_bytes())
    # Both start at once, and both may want to train none/seed-1.
    tasks = [start(folder, "good", "stopped", *flags) for flags in (["--arm=none"], [])]
    (code, output, errors), (other_code, other_output, other_errors) = map(finish, tasks)
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "1 of 2 runs are finished, and not repeated: none/seed-0" in output
    assert "resuming after step" in other_output
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == before
    assert (output + other_output).count("\ndone: ") == 3  # No other run is trained twice.
    assert figures_of(folder / "stopped") == unbroken
    # The routing of each arm is analysed once.
    assert (errors + other_errors).count("routing held_out of ") == len(ARMS)


def test_a_report_alone_shows_the_routing_that_was_analysed_before(
    folder: Path, unbroken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate_here(folder, "unbroken", "--report_only") == 0
    assert "routing" not in capsys.readouterr().err
    report = folder / "unbroken/report"
    assert "Experts chosen together" in (report / "index.html").read_text()
    assert (report / "experts_chosen_together.png").exists()


def test_a_failing_arm_is_listed_and_the_others_are_trained(folder: Path) -> None:
    code, output, errors = finish(start(folder, "broken", "failing", "--seeds=0"))
    assert code == 1
    assert "Traceback" not in errors
    broken, none = json.loads((folder / "failing/report/results.json").read_text())["arms"]
    assert (broken["status"], none["status"]) == ("failed", "done")
    assert "FloatingPointError" in broken["reasons"][0] and " at step 1:" in broken["reasons"][0]
    assert "FloatingPointError" in (folder / "failing/report/index.html").read_text()
    assert (
        "Traceback"
        in json.loads((folder / "failing/arms/broken/seed-0" / FAILURE).read_text())["traceback"]
    )


def test_an_arm_that_has_changed_is_refused_by_key(folder: Path, unbroken: dict[str, Any]) -> None:
    changed = ("--config.router.z_loss_weight=0.5", "--config.train.num_steps=31", "--report_only")
    with pytest.raises(ConfigError) as error:
        ablate_here(folder, "unbroken", *changed)
    message = str(error.value)
    assert "\n" not in message and "arm none: " in message
    assert "changed: router.z_loss_weight (0.001 -> 0.5), train.num_steps (20 -> 31)" in message


def test_arms_that_cannot_be_are_refused_before_the_first_step(folder: Path) -> None:
    with pytest.raises(ConfigError, match="arm none: mesh expert=3"):
        ablate_here(folder, "refused", "--config.mesh.expert=3", "--config.mesh.cpu_devices=8")
    code, _, errors = finish(start(folder, "good", "refused", "--config.data.path=nowhere"))
    assert code == 2
    assert errors.strip().count("\n") == 0 and "nowhere does not exist" in errors
    assert not list((folder / "refused").rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.router.num_experts_per_token=9", "arm none: router.num_experts_per_token=9"),
        ("--config.nothing=1", "arm none: unknown config key nothing"),
        ("--arm=three", "--arm=three is not the name of an arm (none, top-1)"),
        ("--seeds=a", "--seeds=a must be numbers"),
        ("--tokens=0", "--tokens=0 must be over 0"),
        ("--armes=none", "unknown flag '--armes=none'"),
    ],
)
def test_a_wrong_flag_is_named(folder: Path, flag: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ablate.main([f"--config={folder}/good.py", flag])
    assert words in str(error.value)


def initial_parameters(changes: dict[str, Any]) -> dict[Any, Any]:
    """Initialises the model of an arm with these changes."""
    arm, _ = small_ablation(arms={"some": changes, "other": {"model.num_layers": 1}}).arms
    with jax.set_mesh(mesh_of()):
        return dict(nnx.to_flat_state(nnx.state(jax.jit(cpu_model_maker(arm.config))())))


@pytest.fixture(scope="module")
def base_parameters() -> dict[Any, Any]:
    return initial_parameters({})


@pytest.mark.parametrize(
    "changes",
    [
        {"router.load_balance.weight": 0.0},
        {"router.num_experts_per_token": 1},
        {"model.num_experts": 8},
        {"dispatch.capacity_factor": 1.0},
    ],
)
def test_arms_of_a_seed_start_from_the_same_parameters_where_shapes_allow(
    base_parameters: dict[Any, Any], changes: dict[str, Any]
) -> None:
    parameters = initial_parameters(changes)
    assert set(parameters) == set(base_parameters)
    same = [
        np.array_equal(value[...], base_parameters[path][...])
        for path, value in parameters.items()
        if value.shape == base_parameters[path].shape
    ]
    assert all(same)
    assert len(same) == len(parameters) - (4 if "model.num_experts" in changes else 0)
