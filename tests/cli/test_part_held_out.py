"""The verbs call held out only what a model was not trained on, and say how much they score."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import mixtral_jax
from mixtral_jax.cli.flags import FlagParser
from mixtral_jax.cli.task_flags import add_task_flags, choose_data, read_task
from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.eval_data import EvalTask, open_task, read_run, score
from tests.cases import mesh_of, small_config
from tests.data.chat_cases import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"


@pytest.fixture(scope="module")
def loaded():
    """A model with a tokenizer that fits in its vocabulary."""
    bare = mixtral_jax.load_pretrained(GOLDEN, mesh=mesh_of())
    return dataclasses.replace(bare, tokenizer=train_tokenizer())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three documents in a folder, which a run in `run` beside it was trained on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        (folder / f"d{number}.txt").write_text(f"the parser takes {number} arguments\n" * 9)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = small_config(data__path=str(folder))
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


def plan(checkpoint, *arguments, tokenizer=None):
    parser = FlagParser()
    add_task_flags(parser)
    flags, _ = parser.parse_known_args(arguments)
    run = read_run(checkpoint)
    model = SimpleNamespace(config=small_config(), tokenizer=tokenizer)
    return read_task(flags, arguments, run, choose_data(arguments, run), model)


@pytest.mark.parametrize("other", ["folder/d0.txt", "folder/d2.txt", "folder/*.txt", "new.txt"])
@pytest.mark.parametrize("own", [None, "new.txt"])
def test_no_part_of_other_data_than_the_runs_own_is_called_held_out(folder, other, own):
    run, path = folder.parent / "run", f"--data.path={folder.parent / other}"
    also = [f"--data.held_out={folder.parent / own}"] if own else []
    with pytest.raises(ConfigError, match=rf"^--part=held_out: .*{folder}: set --part=all"):
        plan(run, path, *also, "--part=held_out")
    assert plan(run, path, *also).part == "all"
    # They may be named beside the data of the run.
    for spelled in ([], [f"--data.path={folder}/../folder"]):
        assert plan(run, *spelled, *also, "--part=held_out").part == "held_out"


def test_of_weights_that_are_no_runs_only_data_of_ones_own_are_called_held_out(folder):
    with pytest.raises(ConfigError, match=r"checkpoint is no run's: name data\.held_out"):
        plan(folder, f"--data.path={folder}", "--part=held_out")
    asked = f"--data.path={folder}", "--data.held_out=new.txt", "--part=held_out"
    assert plan(folder, *asked).part == "held_out"


@pytest.mark.parametrize("names", [["d1"], ["d0", "d2"], []])
@pytest.mark.parametrize("is_shown", [True, False])
def test_held_out_documents_that_were_trained_on_are_counted(
    loaded, folder, capsys, names, is_shown
):
    held_out = folder.parent / "mine"
    held_out.mkdir()
    (held_out / "new.txt").write_text("each option has a default")
    for name in names:
        (held_out / f"{name}.txt").write_text((folder / f"{name}.txt").read_text())
    asked = f"--data.held_out={held_out}", "--sequence_length=16"
    open_task(loaded, plan(folder.parent / "run", *asked), Processes(0 if is_shown else 1))
    said = f"{len(names)} of {len(names) + 1} documents of data.held_out={held_out} are in data"
    assert (said in capsys.readouterr().err) == bool(names and is_shown)


@pytest.mark.parametrize("value", ["train:4096", "train:280", "mixtral", "nowhere.model"])
def test_a_tokenizer_for_a_model_that_has_one_is_refused(folder, value):
    asked = f"--data.path={folder}", f"--data.tokenizer={value}"
    with pytest.raises(ConfigError, match=rf"^{asked[1]} has no effect.*leave it out"):
        plan(folder, *asked, tokenizer="its own")
    assert plan(folder, *asked).data.tokenizer == value


@pytest.mark.parametrize(
    ("flag", "is_chat"),
    [
        ("--data.chat.template=v1", False),
        ("--data.chat.format=alpaca", False),
        ("--data.text_field=body", True),
    ],
)
def test_keys_of_another_kind_of_data_are_refused(folder, flag, is_chat):
    asked = f"--data.path={folder}", flag
    with pytest.raises(ConfigError, match=rf"^{flag} has no effect.*leave it out"):
        plan(folder, *asked, *["--chat"] * is_chat)
    assert plan(folder, *asked, *["--chat"] * (not is_chat)).is_chat != is_chat


def test_data_held_out_by_name_take_the_place_of_the_fraction_of_the_run(folder):
    config = small_config(data__path=str(folder), data__held_out_fraction=0.25)
    run = folder.parent / "run"
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert plan(run, "--data.held_out=new.txt").data.held_out == "new.txt"
    with pytest.raises(ConfigError, match=r"data\.held_out_fraction=0\.5 has no effect"):
        plan(run, "--data.held_out=new.txt", "--data.held_out_fraction=0.5")


@pytest.mark.parametrize("num_sequences", [1, None])
def test_what_is_scored_is_said_of_how_much(loaded, folder, capsys, num_sequences):
    task = EvalTask(DataConfig(path=str(folder)), "all", False, 16, num_sequences)
    text = open_task(loaded, task, Processes())
    num_rows = sum(plan.num_rows for plan in text.plans)
    # Each of the two stores gives a row at least.
    rows = f"{num_rows} rows" if num_sequences is None else f"2 of {num_rows} rows"
    score(loaded, task, Processes())
    assert f"scoring all of {folder}: {rows} of 16 tokens\n" in capsys.readouterr().err


def test_conversations_that_are_read_as_text_are_told_of_the_flag(loaded, folder):
    chats = folder / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 3)
    with pytest.raises(ConfigError, match=r"data\.text_field.*; if .* conversations, give --chat"):
        open_task(
            loaded, EvalTask(DataConfig(path=str(chats)), "all", False, 16, None), Processes()
        )
