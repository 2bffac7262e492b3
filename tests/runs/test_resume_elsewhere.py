"""Runs that go on elsewhere or for longer, and held-out data of their own."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import jax
import pytest

from mixtral_jax.config import RESUMABLE_KEYS, ConfigError
from mixtral_jax.runs.ablation import check_saved_arms
from mixtral_jax.runs.chat_data import open_chat
from mixtral_jax.runs.resume import resume_or_init
from mixtral_jax.runs.text_data import open_text
from mixtral_jax.runs.workdir import check_saved, open_workdir
from mixtral_jax.training.optimizer import learning_rate_schedule
from tests.cases import make_run, mesh_of, small_config
from tests.data.chat_cases import good_line, train_tokenizer


class Saved:
    """Checkpoints of a run that was saved after step 3."""

    def __init__(self, fingerprint):
        self.record = {"data": fingerprint, "tokens": 1}

    def latest_step(self):
        return 3

    def read_record(self, step):
        return self.record

    def restore(self, step, state):
        return "the state"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    for name, numbers in {"train": range(200), "dev": range(200, 260), "test": range(9)}.items():
        lines = b"\n".join(good_line(number) for number in numbers)
        (tmp_path / "here" / f"{name}.jsonl").write_bytes(lines)
    (tmp_path / "here" / "notes [1].md").touch()
    return tmp_path / "here"


@pytest.fixture
def start(tmp_path, tokenizer):
    """Opens the workdir and the data of a run: gives the run, its data and what it says."""

    def start_it(path, *, is_chat=True, **settings):
        config = small_config(
            model__vocab_size=tokenizer.vocab_size,
            train__sequence_length=96,
            data__path=str(path),
            **settings,
        )
        said = io.StringIO()
        run = make_run(config, mesh_of(), tmp_path / "run", said)
        open_workdir(run.workdir, config, run.processes)
        data = open_chat(run, tokenizer) if is_chat else open_text(run, tokenizer)
        return run, data, said

    return start_it


@pytest.fixture
def begun(start, folder):
    """A run with held-out data of its own that has saved a step."""

    def begin(path=folder, **settings):
        run, data, _ = start(path, **{"data__held_out": "validation", **settings})
        (run.workdir / "checkpoints" / "3").mkdir(parents=True)
        return Saved(data.fingerprint)

    return begin


def saved_data(run):
    data = json.loads((run.workdir / "config.json").read_text())["data"]
    return data["path"], data["held_out"]


def resume(run, saved, data):
    with jax.set_mesh(run.mesh):
        return resume_or_init(run, saved, data.fingerprint)


def test_a_run_goes_on_with_data_that_were_moved_and_says_so(start, begun, folder, tmp_path):
    saved = begun()
    shutil.move(folder, tmp_path / "there")
    run, data, said = start(tmp_path / "there", data__held_out="test")
    assert saved_data(run) == (
        str(folder),
        "validation",
    )  # Until it is known that it is the same content.
    assert resume(run, saved, data).step == 3
    assert f"data.path was {folder}, and is now {tmp_path / 'there'}" in said.getvalue()
    assert "data.held_out was validation, and is now test: evaluations are" in said.getvalue()
    assert saved_data(run) == (str(tmp_path / "there"), "test")


def test_other_data_at_another_place_are_refused_and_the_config_keeps_the_first(
    start, begun, folder, tmp_path
):
    saved = begun()
    shutil.copytree(folder, tmp_path / "there")
    (tmp_path / "there" / "train.jsonl").write_bytes(good_line(1) + b"\n" + good_line(2))
    run, data, _ = start(tmp_path / "there", data__held_out="test")
    with pytest.raises(ConfigError, match=r"differs from what .* was trained on"):
        resume(run, saved, data)
    assert saved_data(run) == (str(folder), "validation")


def test_other_weights_are_refused_with_both_values(start, begun, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    begun(f"{folder}:1,{tmp_path / 'more'}:2")
    with pytest.raises(ConfigError, match=r"changed: the weights of data.path \('.*:1,.*:2' -> "):
        start(f"{folder}:2,{tmp_path / 'more'}:2", data__held_out="validation")
    start(f"{tmp_path / 'more'}:1,{folder}:2", data__held_out="validation")


def test_held_out_data_of_ones_own_may_change_and_those_that_are_drawn_may_not(
    start, begun, folder
):
    saved = begun()
    run, data, _ = start(folder, data__held_out=str(folder / "test.jsonl"))
    assert resume(run, saved, data).step == 3
    other = start(folder, data__held_out="dev")[1]
    assert other.fingerprint == data.fingerprint
    assert other.held_out_fingerprint != data.held_out_fingerprint
    with pytest.raises(ConfigError, match=r"changed: data.held_out \('.*test.jsonl' -> None\)"):
        start(folder)


def test_a_run_that_draws_what_it_holds_out_cannot_change_to_its_own(start, begun, folder):
    begun(data__held_out=None)
    with pytest.raises(ConfigError, match=r"changed: data.held_out \(None -> 'validation'\)"):
        start(folder, data__held_out="validation")


@pytest.mark.parametrize("is_chat", [True, False])
def test_what_is_not_read_and_what_is_held_out_is_said_once(start, folder, is_chat):
    settings = {"data__held_out": "validation", "data__max_bad_fraction": 1.0}
    if not is_chat:
        settings["data__text_field"] = "completion"  # One format of five has it.
    _, _, said = start(folder, is_chat=is_chat, **settings)
    line = (
        f"data.path={folder}: not read: split test: 1 (test.jsonl); other suffixes: 1 (notes "
        "[1].md)\n"
    )
    assert said.getvalue().count(line) == 1
    assert f"reading {folder}, held out validation (tokenized once" in said.getvalue()
    assert "trained on" not in said.getvalue()


@pytest.mark.parametrize("is_chat", [True, False])
def test_held_out_rows_that_are_trained_on_too_are_counted(start, folder, is_chat):
    settings = {"data__max_bad_fraction": 1.0, "data__text_field": "completion"}
    held_out = str(folder / "test.jsonl")
    _, _, said = start(folder, is_chat=is_chat, data__held_out=held_out, **settings)
    what = "9 of 9 held-out conversations too" if is_chat else "2 of 2 held-out documents too"
    assert what in said.getvalue()


def test_a_config_of_a_run_that_has_saved_nothing_binds_nobody(start, folder, tmp_path):
    run, _, _ = start(folder, data__held_out="validation")
    start(folder)
    assert check_saved(run.workdir, run.config) is None


def test_a_run_may_keep_more_or_less_for_the_backward_pass_and_a_refusal_names_all_such_keys(
    tmp_path,
):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    before = small_config(model__remat="full")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(before)))
    assert check_saved(tmp_path, small_config(model__remat="auto")) is None
    with pytest.raises(ConfigError, match=r"changed: train\.seed") as error:
        check_saved(tmp_path, small_config(train__seed=7))
    assert all(key in str(error.value) for key in RESUMABLE_KEYS)


@pytest.mark.parametrize("changed", [{"path": "b.txt"}, {"held_out": "c.txt"}])
def test_arms_of_an_ablation_keep_their_data(tmp_path, changed):
    before = small_config(data__path="a.txt", data__held_out="h.txt")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(before)))
    after = dataclasses.replace(before, data=dataclasses.replace(before.data, **changed))
    arm = SimpleNamespace(name="usual")
    run = SimpleNamespace(arm=arm, config=after, folder=lambda workdir: workdir)
    with pytest.raises(ConfigError, match=rf"arm usual: .*changed: data\.{next(iter(changed))} "):
        check_saved_arms(SimpleNamespace(runs=[run]), tmp_path)


@pytest.mark.parametrize("num_steps", [2, 3, 5, 40])
def test_another_number_of_steps_is_said_with_what_it_does_to_the_learning_rate(
    start, begun, folder, num_steps
):
    saved = begun(train__num_steps=3)
    saved.record["num_steps"] = 3
    run, data, said = start(folder, data__held_out="validation", train__num_steps=num_steps)
    record = resume(run, saved, data).record
    assert record["num_steps"] == num_steps
    line = f"train.num_steps was 3, and is now {num_steps}: "
    assert (line in said.getvalue()) == (num_steps > 3)
    if num_steps > 3:
        rate = float(learning_rate_schedule(run.config.optimizer, num_steps)(3))
        assert f"to {rate:.2g} at step 4" in said.getvalue().replace("\n", " ")
