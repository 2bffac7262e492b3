"""The verb `analyze`: what it prints, and where it writes; one process or several."""

import json
import shutil
import subprocess
import sys

import pytest

from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.analysis import analyze_run
from tests.cases import mesh_of
from tests.cli.test_asking import GOLDEN
from tests.scripts import environment, finish, free_port, start, write_text

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, and a run of four steps on it that saved two of them."""
    place = tmp_path_factory.mktemp("analyze")
    write_text(place)
    flags = (
        "--config.train.num_steps=4",
        "--config.checkpoint.every=2",
        "--config.data.held_out_fraction=0.3",
    )
    code, _, errors = finish(start(place, *flags, "--workdir=run", "--config.mesh.cpu_devices=4"))
    assert code == 0, errors
    return place


def run(place, *flags):
    command = [sys.executable, "-m", "mixtral_jax", "analyze", *flags]
    return subprocess.Popen(
        command,
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_is_analysed_by_its_own_held_out_text_the_same_by_several_processes(place):
    code, output, errors = finish(run(place, "--checkpoint=run", "--json"))
    assert code == 0, errors
    figures = json.loads(output)
    written = place / "run" / "analysis" / "4"
    kept = json.loads((written / "analysis.json").read_text())
    assert (
        set(kept.pop("pictures")) == {file.name for file in written.glob("*.png")}
        and kept == figures
    )
    assert {"load_of_experts.png", "saturation_of_routes.png"} <= {
        file.name for file in written.iterdir()
    }
    assert (figures["step"], figures["part"], figures["saturation"]["steps"]) == (
        4,
        "held_out",
        [2],
    )
    assert figures["num_experts"] == 8 and figures["flips"]["other_dtype"] == "bfloat16"

    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    shared = ("--checkpoint=run", "--json", "--to=elsewhere", "--num_processes=2", coordinator)
    mesh = ("--mesh.cpu_devices=2", "--mesh.expert=2", "--mesh.fsdp=2")
    processes = [run(place, *shared, *mesh, f"--process_id={i}") for i in range(2)]
    (code, output, errors), (other_code, nothing, _) = map(finish, processes)
    assert (code, other_code, nothing) == (0, 0, ""), errors
    same = (
        "num_tokens",
        "balance",
        "coactivation",
        "repetition",
        "by_label",
        "vocabulary",
        "saturation",
    )
    for name in same:
        assert json.loads(output)[name] == figures[name], name


def test_a_run_is_analysed_in_a_process_that_has_its_devices_already(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    analysis = analyze_run(place / "run", mesh_of(expert=4), Processes())
    assert (
        analysis.num_tokens
        == json.loads((place / "run/analysis/4/analysis.json").read_text())["num_tokens"]
    )
    assert analysis.flips is None and analysis.saturation.steps == (2,)
    with pytest.raises(ConfigError, match="no run that has saved a checkpoint"):
        analyze_run(place, mesh_of(), Processes())


def test_the_first_checkpoint_has_no_saturation_and_the_table_says_so(place):
    (place / "first").mkdir()
    for name in ("saturation_of_routes.png", "mine.png"):
        (place / "first" / name).touch()
    # An earlier analysis, of another text.
    (place / "first" / "analysis.json").write_text('{"pictures": ["saturation_of_routes.png"]}')
    code, output, errors = finish(
        run(place, "--checkpoint=run/checkpoints/2", "--to=first", "--num_sequences=3")
    )
    assert code == 0, errors
    assert "no saturation" in output and "even, by chance" in output and "46.4%" in output
    assert (
        not (place / "first" / "saturation_of_routes.png").exists()
        and (place / "first" / "mine.png").exists()
    )
    assert json.loads((place / "first" / "analysis.json").read_text())["step"] == 2


def test_data_and_a_place_for_figures_are_asked_for_before_anything_is_loaded(place, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "model")
    (tmp_path / "ablation/arms/none/seed-0").mkdir(parents=True)
    with pytest.raises(
        ConfigError,
        match=r"is an ablation: name a run of it \(arms/NAME/seed-N\), as .*/none/seed-0",
    ):
        run_verb(["analyze", f"--checkpoint={tmp_path / 'ablation'}"])
    with pytest.raises(ConfigError, match=r"--data\.path=TEXT"):
        run_verb(["analyze", f"--checkpoint={tmp_path / 'model'}"])
    code, output, errors = finish(run(place, "--checkpoint=run", "--to=text.txt/below"))
    assert (
        (code, output) == (2, "")
        and "text.txt/below cannot be made" in errors
        and "--to=DIR" in errors
    )
