"""The plan verb: what it refuses, and its JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.cli import plan
from mixtral_jax.config import ConfigError
from mixtral_jax.plan import topology
from mixtral_jax.plan.topology import open_target, parse_topology

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'configs/pretrain/tiny.py'}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5p:3x3x3"], ["v5p:3x3x3", "no such slice", "2x4x4", "16x16x24"]),
        (["--topology=v5p:8x4x4"], ["no such slice", "4x4x8"]),
        (["--topology=v6e:32x16"], ["no such slice", "16x16"]),
        (["--topology=v5p-128"], ["unknown chip 'v5p-128'", "v5p:16x16x24"]),
        (["--topology=v9:2x2"], ["unknown chip 'v9'", "h100:8"]),
        (["--topology=v5p:"], ["no such slice", "4x4x4"]),
        (["--topology=h100:0"], ["h100:0", "from 1"]),
        (["--topology=h100:four"], ["h100:four", "h100:8"]),
        (
            ["--topology=h100:8", "--sweep", "--sweep_batch_sizes=a"],
            ["--sweep_batch_sizes=a", "64,128"],
        ),
        (["--topology=h100:8", "--sweep_limit=0"], ["--sweep_limit=0", "at least 1"]),
        ([], ["--topology", "required"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_would_work(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        plan.main([TINY, *arguments])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_slices_that_exist_are_known() -> None:
    for name, chips in {
        "v5p:2x2x1": 4,
        "v5p:4x4x4": 64,
        "v5p:4x4x8": 128,
        "v5p:8x8x8": 512,
        "v6e:16x16": 256,
        "tpu7x:4x4x4": 128,
    }.items():
        assert parse_topology(name).num_devices == chips
    assert parse_topology("h200:12").num_devices == 12


def test_without_libtpu_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'.*--cpu_fallback"):
        open_target(parse_topology("v5p:2x2x2"), cpu_fallback=False)
    target = open_target(parse_topology("v5p:2x2x2"), cpu_fallback=True)
    assert target.is_estimate
    assert len(target.devices) == 8


SMALL = [
    TINY,
    "--config.model.num_layers=1",
    "--config.model.hidden_size=64",
    "--config.train.sequence_length=32",
]


@pytest.mark.runs
def test_json_is_alone_on_standard_output() -> None:
    """In a process of its own, which has sixteen virtual devices."""
    command = [sys.executable, "-m", "mixtral_jax", "plan", *SMALL, "--topology=h100:16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["topology"], figures["num_devices"], figures["is_estimate"]) == (
        "h100:16",
        16,
        True,
    )
    assert figures["mesh"]["expert"] * figures["mesh"]["data"] == 16


def test_an_estimate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*SMALL, "--topology=h200:8"]) == 0
    shown = capsys.readouterr().out
    assert "an estimate: compiled on virtual CPU devices, not for h200" in shown
    assert "fits" in shown


def test_a_mesh_that_does_not_fill_it_is_refused_with_those_that_would() -> None:
    mesh = ["--config.mesh.expert=4", "--config.mesh.data=1"]
    with pytest.raises(ConfigError) as error:
        plan.main([*SMALL, "--topology=h100:8", *mesh])
    assert "\n" not in str(error.value)
    assert "meshes that fit: " in str(error.value)
