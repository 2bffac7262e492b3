"""What a start left that saved no step flows into no later run in its folder; a saved run stays."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_jax.checkpoint.formats.side_files import SIDE_FILES, SideFiles, open_side_files
from mixtral_jax.data.tokenizer import read_tokenizer
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs import tune
from mixtral_jax.runs.chat_data import open_chat
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.workdir import open_workdir, release_workdirs
from tests.cases import make_run, mesh_of, small_config
from tests.data.chat_cases import good_line, train_tokenizer
from tests.data.test_vocabulary import train

FIRST, SECOND = SideFiles(eos_ids=(7,)), SideFiles(eos_ids=(9,), generation={"temperature": 0.6})
UPCYCLED = {"upcycle": {"base": "x"}}


class StoppedError(Exception):
    """The run goes no further than a test needs."""


def save_step(workdir, step):
    (workdir / "checkpoints" / f"{step}").mkdir(parents=True)


def start(workdir, side_files, monkeypatch):
    """Tunes a base with these side files, up to its first question."""

    def stop(*_):
        raise StoppedError

    monkeypatch.setattr(tune, "open_chat", lambda *_: SimpleNamespace(template="v1"))
    monkeypatch.setattr(tune, "ask_base", stop)
    run = make_run(small_config(finetune={}), mesh_of(), workdir)
    weights = SimpleNamespace(side_files=side_files)
    base: Any = SimpleNamespace(tokenizer=train_tokenizer(), weights=weights)
    with pytest.raises(StoppedError):
        tune.tune(run, base, StopSignal(run.processes))


@pytest.mark.parametrize("later", [{}, {"finetune": {}}, UPCYCLED])
@pytest.mark.parametrize("tokenizer", ["train:90", "some.model"])
@pytest.mark.parametrize("left", ["nothing", "a start", "a step"])
def test_a_run_finds_what_a_start_left_only_if_that_saved_a_step(tmp_path, later, tokenizer, left):
    config = small_config(data__tokenizer=tokenizer, **later)
    FIRST.save(tmp_path)
    train_tokenizer().save(tmp_path / "tokenizer.model")
    if left != "nothing":
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    if left == "a step":
        save_step(tmp_path, 3)
    open_workdir(tmp_path, config, Processes())
    release_workdirs()
    kept = {name for name in (SIDE_FILES, "tokenizer.model") if (tmp_path / name).exists()}
    removed = {SIDE_FILES, "tokenizer.model"} if tokenizer == "train:90" else {SIDE_FILES}
    assert {SIDE_FILES, "tokenizer.model"} - kept == (removed if left == "a start" else set())


@pytest.mark.parametrize("step", [None, 3])
def test_a_tuning_takes_what_its_base_says_when_it_begins_and_keeps_it(tmp_path, monkeypatch, step):
    start(tmp_path, FIRST, monkeypatch)
    assert open_side_files(tmp_path).eos_ids[0] == 7
    if step is not None:
        save_step(tmp_path, step)
    start(tmp_path, SECOND, monkeypatch)
    said = open_side_files(tmp_path)
    assert (said.eos_ids[0], said.generation) == ((9, SECOND.generation) if not step else (7, {}))


@pytest.mark.parametrize("step", [None, 3])
def test_a_saved_tuning_keeps_its_tokenizer_whatever_its_base_has_now(tmp_path, monkeypatch, step):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chats, workdir = tmp_path / "chats.jsonl", tmp_path / "run"
    chats.write_bytes(b"\n".join(good_line(number) for number in range(200)))
    first, second = train_tokenizer(), train()
    workdir.mkdir()
    first.save(workdir / "tokenizer.model")
    if step is not None:
        save_step(workdir, step)
    sizes = {"train__sequence_length": 120, "model__vocab_size": 512}
    config = small_config(finetune={}, data__path=str(chats), **sizes)
    open_chat(make_run(config, mesh_of(), workdir), second)
    kept = read_tokenizer(str(workdir / "tokenizer.model")).fingerprint
    assert (
        kept == (first if step else second).fingerprint != (second if step else first).fingerprint
    )
