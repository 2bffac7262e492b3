"""`mixtral-jax ablate` as users run it: stopped and started again, with an arm that fails, split
over processes.
"""

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
from tests import scripts as runs
from tests.cases import cpu_model_maker, mesh_of
from tests.lab.ablations import small_ablation
from tests.scripts import finish, lines_of, wait_for_step, write_text

STEPS = 30
ARMS = {"none": {"router.load_balance.weight": 0.0}, "top-1": {"router.num_experts_per_token": 1}}
# Numbers of this size overflow in the first step.
BROKEN = {"broken": {"model.initializer_range": 1e30}, "none": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a text and two ablation files; workdirs and caches lie beside them."""
    folder = tmp_path_factory.mktemp("ablations")
    write_text(folder)
    for name, arms in (("good", ARMS), ("broken", BROKEN)):
        entries = {"question": "Which?", "arms": arms, "reference": "none", "seeds": (0, 1)}
        base = f"dict(tiny.get_config(), train=dict(num_steps={STEPS}, batch_size=8, sequence_length=32))"
        (folder / f"{name}.py").write_text(
            "from configs.pretrain import tiny\n\n\ndef get_config():\n    return "
            f"dict({entries!r}, base={base})\n"
        )
    return folder


def start(folder: Path, file: str, name: str, *flags: str) -> subprocess.Popen:
    """An ablation of the small model in the workdir `name`."""
    chosen = (
        f"--config={folder / file}.py",
        f"--workdir={folder / name}",
        "--config.mesh.cpu_devices=1",
        "--config.model.num_layers=1",
    )
    more = ("--config.log.tensorboard=false", "--config.train.eval_every=10")
    return runs.start(folder, *chosen, *more, *flags, program=("-m", "mixtral_jax", "ablate"))


def figures_of(workdir: Path) -> dict[str, Any]:
    """results.json without what may differ between two runs of one ablation."""
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


def test_a_stopped_ablation_that_two_tasks_go_on_with_repeats_nothing_and_reports_the_same(
    folder: Path, unbroken: dict[str, Any]
) -> None:
    process = start(folder, "good", "stopped")
    wait_for_step(process, folder / "stopped/arms/top-1/seed-0/metrics.jsonl", 12)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 75, errors
    assert not (folder / "stopped/report").exists()
    assert (folder / "stopped/arms/top-1/seed-0" / DATA).exists()  # Before its end.
    finished = folder / "stopped/arms/none/seed-0/metrics.jsonl"
    before = (finished.stat().st_mtime_ns, finished.read_bytes())
    # At once, and both may want none/seed-1.
    tasks = [start(folder, "good", "stopped", *flags) for flags in (["--arm=none"], [])]
    (code, said, noted), (other_code, other_said, other_noted) = map(finish, tasks)
    assert (code, other_code) == (0, 0), noted + other_noted
    assert "1 of 2 runs are finished, and not repeated: none/seed-0" in said
    assert "resuming after step" in other_said
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == before
    assert (said + other_said).count("\ndone: ") == 3  # None of the other runs twice.
    assert figures_of(folder / "stopped") == unbroken
    assert (noted + other_noted).count("routing 4 rows") == len(
        ARMS
    )  # Each arm was looked at once.


def test_a_report_alone_shows_what_was_seen_of_routers_before(
    folder: Path, unbroken: dict[str, Any]
) -> None:
    code, _, errors = finish(start(folder, "good", "unbroken", "--report_only"))
    assert code == 0 and "routing" not in errors, errors
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
    code, _, errors = finish(start(folder, "good", "unbroken", *changed))
    assert code == 2
    assert errors.strip().count("\n") == 0
    assert "arm none: " in errors
    assert "changed: router.z_loss_weight (0.001 -> 0.5), train.num_steps (30 -> 31)" in errors


def test_arms_that_cannot_be_are_refused_before_the_first_step(folder: Path) -> None:
    for flag, words in (
        ("--config.mesh.expert=3", "arm none: mesh expert=3"),
        ("--config.data.path=nowhere", "nowhere does not exist"),
    ):
        code, _, errors = finish(start(folder, "good", "refused", flag))
        assert code == 2, flag
        assert errors.strip().count("\n") == 0 and words in errors
    assert not list((folder / "refused").rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.router.num_experts_per_token=9", "arm none: router.num_experts_per_token=9"),
        ("--config.nothing=1", "arm none: unknown config key nothing"),
        ("--arm=three", "--arm=three is no arm (none, top-1)"),
        ("--seeds=a", "--seeds=a must be numbers"),
        ("--tokens=0", "--tokens=0 must be over 0"),
        ("--armes=none", "unknown flag '--armes=none'"),
    ],
)
def test_a_wrong_flag_is_named(folder: Path, flag: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ablate.main([f"--config={folder}/good.py", flag])
    assert words in str(error.value)


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
    changes: dict[str, Any],
) -> None:
    ablation = small_ablation(arms={"some": {}, "other": changes})
    with jax.set_mesh(mesh_of()):
        some, other = (
            nnx.to_flat_state(nnx.state(jax.jit(cpu_model_maker(arm.config))()))
            for arm in ablation.arms
        )
    same = [
        np.array_equal(one[...], two[...])
        for (_, one), (_, two) in zip(some, other, strict=True)
        if one.shape == two.shape
    ]
    assert all(same)
    assert len(same) == len(some) - (4 if "model.num_experts" in changes else 0)
