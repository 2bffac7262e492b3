"""Every shipped config builds, says how to run it, and fits the machine in its name."""

import ast
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from mixtral_jax.config import (
    Config,
    ConfigError,
    build,
    load_config,
    load_config_file,
    run_config_file,
)
from mixtral_jax.lab.ablation.definition import plan_ablation, read_ablation
from mixtral_jax.parallel.mesh import MESH_AXES, resolve_mesh
from tests.cases import small_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
COMMANDS = {
    "pretrain": "python train.py",
    "instruct": "python finetune_instruct.py",
    "ablations": "python -m mixtral_jax ablate",
    "bench": "python -m mixtral_jax bench --{name}",
}
SHIPPED = sorted(
    path
    for folder in COMMANDS
    for path in (CONFIGS / folder).glob("*.py")
    if path.stem != "__init__"
)
# The config of a script that is run without --config.
DEFAULTS = ("pretrain/tiny.py", "instruct/tiny.py")
NUM_DEVICES = {"tiny": 8, "mixtral_8x7b_v5p": 64, "mixtral_8x7b_v6e": 256, "mixtral_8x22b_v5p": 128}

each_config = pytest.mark.parametrize(
    "path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}"
)


@each_config
def test_a_shipped_config_builds(path: Path) -> None:
    if path.parent.name == "ablations":
        ablation = plan_ablation(run_config_file(path, read_ablation))
        assert len(ablation.arms) >= 2 and len(ablation.seeds) >= 3
    else:
        assert isinstance(build(Config, load_config_file(path)), Config)


@each_config
def test_a_shipped_config_names_its_command(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    name = f"{path.parent.name}/{path.name}"
    command = COMMANDS[path.parent.name].format(name=path.stem) + (
        "" if name in DEFAULTS else f" --config=configs/{name}"
    )
    assert command in docstring


@pytest.mark.parametrize("name", NUM_DEVICES)
def test_a_pretraining_config_fits_its_machine(name: str) -> None:
    config = build(Config, load_config_file(CONFIGS / "pretrain" / f"{name}.py"))
    mesh = resolve_mesh(config, NUM_DEVICES[name]).mesh
    assert math.prod(getattr(mesh, axis) for axis in MESH_AXES) == NUM_DEVICES[name]
    assert mesh.expert == config.model.num_experts == 8  # An expert each.


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [
        ("mixtral_8x7b_lora", 8),
        ("mixtral_8x7b_full", 8),
        ("mixtral_8x7b_full", 16),
    ],
)
def test_a_tuning_config_fits_its_machines_and_trains_what_its_name_says(
    name: str, num_devices: int
) -> None:
    config = build(Config, load_config_file(CONFIGS / "instruct" / f"{name}.py"))
    mesh = resolve_mesh(config, num_devices).mesh
    assert math.prod(getattr(mesh, axis) for axis in MESH_AXES) == num_devices
    assert config.finetune is not None
    assert (config.finetune.lora.rank > 0) == name.endswith("lora")
    assert config.model.num_layers == 32


def test_configs_of_pods_keep_the_size_in_their_names() -> None:
    models = load_config_file(CONFIGS / "pretrain/mixtral_8x22b_v5p.py")["model"]
    assert (models["hidden_size"], models["num_layers"]) == (6144, 56)
    for name in ("mixtral_8x7b_v5p", "mixtral_8x7b_v6e"):
        models = load_config_file(CONFIGS / f"pretrain/{name}.py")["model"]
        assert (models["hidden_size"], models["num_layers"]) == (4096, 32)


def test_a_copied_file_finds_the_shipped_configs_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    for module in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, module)
    copy = shutil.copy(CONFIGS / "ablations/balance.py", tmp_path / "mine.py")
    assert run_config_file(copy, read_ablation).arms
    assert load_config_file(Path("configs/pretrain/tiny.py")) == load_config_file(
        CONFIGS / "pretrain/tiny.py"
    )


@pytest.mark.parametrize("kind", ["pretrain", "instruct"])
def test_the_config_json_of_a_run_is_a_config_file(tmp_path, kind):
    config = build(Config, load_config_file(CONFIGS / kind / "tiny.py"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(tmp_path / "config.json") == config
    longer = load_config(tmp_path / "config.json", {"train.num_steps": 1234})
    assert longer.train.num_steps == 1234


@pytest.mark.parametrize("section", ["finetune", "upcycle"])
def test_a_section_that_a_run_does_not_have_may_be_added(tmp_path, section):
    config = build(Config, load_config_file(CONFIGS / "pretrain/tiny.py"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert getattr(config, section) is None
    added = load_config(tmp_path / "config.json", {f"{section}.base": "x"})
    assert getattr(added, section).base == "x"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", "{", r"cannot be read: Expecting property name"),
        ("config.json", "[1]", "is not the config.json of a run, an object with the sections"),
        ("config.json", '{"model_type": "mixtral"}', "is not the config.json of a run"),
        ("config.json", '{"train": {}}'.encode("utf-16"), "is not UTF-8 .*: save it as UTF-8"),
        ("renamed.py", '{"finetune": null}', "'null' is not defined: it holds JSON, so name it"),
        ("renamed.py", "{}", "it holds JSON, so name it .json"),
        ("run.yaml", "train: {}", r"must be a .py file with a function get_config\(\)"),
        ("run/config.json", "{}", r"run: is a folder: name its config.json"),
        ("run/other.py", "", r"run: is a folder: name a .py file in it"),
    ],
)
def test_what_is_no_config_file_is_refused_by_name(tmp_path, name, content, error):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=error):
        load_config(file if file.parent == tmp_path else file.parent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"upcycle": {"method": "copy", "noise_std": 0.3}}, "noise_std=0.3"),
        ({"upcycle": {"base": "x", "noise_std": 0.3}}, "noise_std=0.3"),
        ({"upcycle": {"method": "noise", "drop_fraction": 1}}, "drop_fraction=1.0"),
        ({"finetune__lora": {"rank": 0, "alpha": 4}}, "finetune.lora.alpha=4.0"),
        ({"finetune__lora": {"rank": 0, "targets": "attention"}}, "lora.targets=attention"),
        ({"data__held_out": "x", "data__held_out_fraction": 0.1}, "held_out_fraction=0.1"),
        ({"data__chat": {"format": "alpaca"}}, "data.chat.format=alpaca"),
        ({"data__chat": {"long_rows": "drop"}, "upcycle": {"method": "copy"}}, "long_rows=drop"),
        ({"finetune__base": "x", "data__text_field": "body"}, "data.text_field=body"),
        ({"optimizer": {"name": "adafactor", "beta1": 0.8}}, "optimizer.beta1=0.8"),
        ({"optimizer": {"name": "adafactor", "beta2": 0.99}}, "optimizer.beta2=0.99"),
        ({"optimizer": {"name": "adafactor", "epsilon": 1e-6}}, "optimizer.epsilon=1e-06"),
        (
            {"optimizer": {"name": "adafactor", "first_moment_dtype": "float32"}},
            "first_moment_dtype=float32",
        ),
        # The same one on every process.
        ({"upcycle": {"method": "copy", "drop_fraction": 1, "noise_std": 1}}, "noise_std=1.0"),
    ],
)
def test_a_setting_that_another_makes_void_is_refused_by_name(changes, words) -> None:
    with pytest.raises(ConfigError, match=f"{words} has no effect, since .*: leave it out"):
        small_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"upcycle": {"method": "noise", "noise_std": 0.3}},
        {"upcycle": {"method": "drop", "drop_fraction": 1}},
        {"finetune__lora": {"rank": 1, "alpha": 4, "targets": "attention"}},
        {"data__held_out_fraction": 0.1},
        {"optimizer": {"name": "muon", "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6}},
        {"optimizer": {"name": "muon", "first_moment_dtype": "float32"}},
        {"finetune": {}, "data__chat": {"format": "alpaca"}},
        {"finetune": {}, "data__text_field": "body"},  # Of the text that the base is made of.
    ],
)
def test_a_setting_that_is_used_is_taken(changes) -> None:
    assert small_config(**changes)
