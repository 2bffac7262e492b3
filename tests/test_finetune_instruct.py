"""Runs of finetune_instruct.py: from nothing, from a base, stopped and gone on with, with adapters,
with seeds.
"""

import json
import shutil
import signal

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.cli.tune_flags import parse_tuning_flags
from mixtral_jax.config import ConfigError
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.tune import find_base
from tests.scripts import (
    TINY,
    finish,
    free_port,
    lines_of,
    start_tuning,
    wait_for_step,
    write_chats,
)

pytestmark = pytest.mark.runs

LORA = (
    "--config.finetune.lora.rank=3",
    "--config.finetune.lora.targets=attention+experts+router",
    "--config.dispatch.grouped_matmul=ragged_dot",  # The quickest to compile.
)
QUESTION = [{"role": "user", "content": "5: a dog?"}]


@pytest.fixture(scope="module")
def folder(folder):
    """Holds conversations too."""
    write_chats(folder)
    return folder


def tune(folder, name, *flags):
    """What a run that ends well has printed."""
    code, output, errors = finish(start_tuning(folder, f"--workdir={folder / name}", *flags))
    assert code == 0, errors
    return output


@pytest.fixture(scope="module")
def unbroken(folder):
    return tune(folder, "unbroken")


def test_a_run_from_nothing_pretrains_tunes_and_exports(folder, unbroken):
    workdir = folder / "unbroken"
    assert [line["step"] for line in lines_of(workdir / "base")] == list(range(1, 13))
    lines = lines_of(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["eval/loss"] < 0.8 * lines[-1]["eval/loss_base"]
    assert {path.name for path in workdir.iterdir()} >= {
        "config.json",
        "tokenizer.model",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "export",
        "answers.json",
    }
    said = json.loads((workdir / "answers.json").read_text())
    assert said["asked"] == len(said["answers"]) > 1
    assert said["base"]["loss"] == pytest.approx(lines[-1]["eval/loss_base"])
    assert said["tuned"]["loss"] == pytest.approx(lines[-1]["eval/loss"], rel=1e-5)
    assert said["answers"][0]["expected"].startswith("Quick ")
    assert f"held-out loss on answers: {said['base']['loss']:.3f} before" in unbroken


def test_the_export_is_the_newest_checkpoint_and_chats(folder, unbroken):
    of_run = mixtral_jax.load_pretrained(folder / "unbroken")
    exported = mixtral_jax.load_pretrained(folder / "unbroken" / "export")
    ids = [ChatTemplate(exported.tokenizer).encode(QUESTION, mode="serving").tokens.tolist()]
    np.testing.assert_array_equal(of_run.logits(ids), exported.logits(ids))
    assert isinstance(exported.chat(QUESTION, max_new_tokens=4), str)


def test_a_run_that_is_stopped_twice_equals_straight_through(folder, unbroken):
    workdir = folder / "stopped"
    for part in (workdir / "base", workdir):
        process = start_tuning(folder, f"--workdir={workdir}")
        wait_for_step(process, part / "metrics.jsonl", 3)
        process.send_signal(signal.SIGTERM)
        code, output, errors = finish(process)
        assert code == 75, (output, errors)
        assert lines_of(part)[-1]["step"] < 12
        assert not (workdir / "export").exists()
    assert "pretraining a base" not in tune(folder, "stopped")
    for part in ("", "base"):
        assert lines_of(workdir / part) == lines_of(folder / "unbroken" / part)
    assert (workdir / "answers.json").read_text() == (
        folder / "unbroken" / "answers.json"
    ).read_text()
    weights = "export/model.safetensors"
    assert (workdir / weights).read_bytes() == (folder / "unbroken" / weights).read_bytes()


def test_adapters_learn_the_same_on_one_device_and_on_expert_4_fsdp_2(folder, unbroken):
    base = f"--config.finetune.base={folder / 'unbroken' / 'base'}"
    tune(folder, "lora1", base, *LORA, "--config.mesh.cpu_devices=1")
    mesh = ("--config.mesh.cpu_devices=8", "--config.mesh.expert=4", "--config.mesh.fsdp=2")
    tune(folder, "lora8", base, *LORA, *mesh, "--config.finetune.frozen_dtype=float32")
    one, eight = lines_of(folder / "lora1"), lines_of(folder / "lora8")
    for name in ("loss", "eval/loss"):
        np.testing.assert_allclose(
            [line[name] for line in one if name in line],
            [line[name] for line in eight if name in line],
            rtol=1e-5,
        )
    assert one[-1]["loss"] < one[0]["loss"]
    assert (folder / "lora8" / "adapters/peft/adapter_model.safetensors").exists()
    assert (folder / "lora8" / "adapters/mistral/lora.safetensors").exists()
    # What was asked at the end is the run, its adapters merged as they were read; the figures of
    # the loop are unmerged.
    said = json.loads((folder / "lora8" / "answers.json").read_text())
    assert said["tuned"]["loss"] == pytest.approx(eight[-1]["eval/loss"], rel=1e-5)


def test_of_several_seeds_the_best_is_exported(folder, unbroken):
    base = folder / "base"  # A Hugging Face folder, this time, with settings of its own.
    shutil.copytree(folder / "unbroken" / "export", base)
    (base / "generation_config.json").write_text('{"eos_token_id": [5, 2], "temperature": 0.6}')
    output = tune(
        folder,
        "seeds",
        f"--config.finetune.base={base}",
        "--config.model.hidden_size=64",
        "--seeds=2",
    )
    losses = [lines_of(folder / "seeds" / f"seed-{seed}")[-1]["eval/loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    best = int(losses[1] < losses[0])
    summary = json.loads((folder / "seeds" / "seeds.json").read_text())
    assert summary["best"] == best and summary["mean"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert f"seed {best}: held-out loss" in output
    kept = json.loads((folder / "seeds" / "export" / "generation_config.json").read_text())
    assert (sorted(kept["eos_token_id"]), kept["temperature"]) == ([2, 5], 0.6)
    exported = mixtral_jax.load_pretrained(folder / "seeds" / "export")
    of_best = mixtral_jax.load_pretrained(folder / "seeds" / f"seed-{best}")
    np.testing.assert_array_equal(exported.logits([[1, 2, 3]]), of_best.logits([[1, 2, 3]]))
    assert (
        exported.config.model.hidden_size == 32
    )  # The shape is that of the base, whatever the config says.


@pytest.mark.full
def test_two_processes_tune_several_seeds_from_nothing_as_one_does(folder):
    flags = (*LORA, "--seeds=2")
    tune(folder, "one", *flags, "--config.mesh.cpu_devices=8")
    coordinator = f"--coordinator=localhost:{free_port()}"
    two = [
        start_tuning(
            folder,
            *flags,
            f"--workdir={folder / 'two'}",
            coordinator,
            "--num_processes=2",
            f"--process_id={index}",
        )
        for index in range(2)
    ]
    ends = [finish(process) for process in two]
    assert [code for code, _, _ in ends] == [0, 0], ends
    for part in ("base", "seed-0", "seed-1"):
        losses = [
            [line["loss"] for line in lines_of(folder / name / part)] for name in ("one", "two")
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    assert (folder / "two" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.data.path=nowhere", ["data.path=nowhere", "does not exist"]),
        ("--config.model.num_layers=2", ["unbroken/base", "model.num_layers (1 -> 2)"]),
        (
            "--config.finetune.pretrain.num_steps=13",
            ["unbroken holds", "finetune.pretrain.num_steps (12 -> 13)"],
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_trained(
    folder, unbroken, flag, words
):
    code, output, errors = finish(start_tuning(folder, f"--workdir={folder / 'unbroken'}", flag))
    assert code == 2 and "compiling" not in output
    assert errors.strip().count("\n") == 0
    for word in words:
        assert word in errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds=none"], ["--seeds", "'none'", "whole number"]),
        (["--seeds=0"], ["--seeds", "at least 1"]),
        ([f"--config={TINY}"], ["no section finetune", "train.py"]),
        (["--config.finetune.pretrain.num_steps=0"], ["finetune.pretrain.num_steps=0", "positive"]),
    ],
)
def test_wrong_flags_are_named_with_what_would_be_right(flags, words):
    with pytest.raises(ConfigError) as error:
        parse_tuning_flags(flags, description="", default_config="instruct/tiny.py")
    for word in words:
        assert word in str(error.value)


def test_a_base_that_is_not_there_is_named(tmp_path):
    flags = parse_tuning_flags(
        ["--config.finetune.base=nowhere"], description="", default_config="instruct/tiny.py"
    )
    with pytest.raises(ConfigError, match=r"finetune\.base=nowhere is no folder"):
        find_base(flags.run.config, tmp_path, Processes(), StopSignal())


@pytest.mark.parametrize("flag", ["model.num_shared_experts=1", "router.score=sigmoid"])
def test_a_base_that_could_not_be_tuned_is_refused_before_it_is_pretrained(tmp_path, flag):
    flags = parse_tuning_flags(
        [f"--config.{flag}"], description="", default_config="instruct/tiny.py"
    )
    with pytest.raises(ConfigError, match="tuning exports its model") as error:
        find_base(flags.run.config, tmp_path / "run", Processes(), StopSignal())
    assert flag.partition("=")[0] in str(error.value)
    assert not (tmp_path / "run").exists()
