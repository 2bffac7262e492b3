"""Conversations on the mesh, as a run of instruct tuning reads them."""

import dataclasses
import io
import json
import types
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint.formats.side_files import SideFiles
from mixtral_jax.config import ChatConfig, ConfigError
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.runs.chat_data import open_chat
from mixtral_jax.runs.eval_data import EvalTask, open_task
from tests.cases import cpu_model_maker, make_run, mesh_of, small_config
from tests.data.chat_cases import good_line, train_tokenizer, write_mixed_rows

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def open_run(tmp_path, monkeypatch, tokenizer):
    """Opens the chat data of a run with settings of its own; gives it with what was said and the
    run.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def open_it(path, **settings):
        settings = {"train__sequence_length": LENGTH, "data__held_out_fraction": 0.1, **settings}
        config = small_config(
            model__vocab_size=tokenizer.vocab_size, data__path=str(path), finetune={}, **settings
        )
        said = io.StringIO()
        run = make_run(config, mesh_of(), tmp_path, said)
        return open_chat(run, tokenizer), said.getvalue(), run

    return open_it


def write_good(file, count):
    file.write_bytes(b"\n".join(good_line(number) for number in range(count)))
    return file


def test_batches_are_packed_conversations_with_the_mask_of_their_answers(
    open_run, tokenizer, tmp_path
):
    data, said, _ = open_run(write_good(tmp_path / "f.jsonl", 200))
    batch, _ = next(data.train_batches.iterate(0))
    assert batch.tokens.shape == (1, 8, LENGTH)
    learnt = np.asarray(batch.targets)[np.asarray(batch.loss_mask) == 1]
    answers = tokenizer.decode(learnt.tolist())
    assert "It is" in answers and "What" not in answers and "INST" not in answers
    ends = (learnt == tokenizer.eos_id).sum()
    assert ends == np.asarray(batch.segment_ids).max(axis=-1).sum()
    assert "conversations in template v1" in said and "left out" not in said


def test_batches_resume_from_their_number(open_run, tmp_path):
    data, _, _ = open_run(write_good(tmp_path / "f.jsonl", 200))
    straight = data.train_batches.iterate(0)
    hashes = [next(straight)[1] for _ in range(5)]
    straight.close()
    resumed = open_run(tmp_path / "f.jsonl")[0].train_batches.iterate(3)
    assert [next(resumed)[1] for _ in range(2)] == hashes[3:]
    resumed.close()


def test_the_fingerprint_follows_data_template_and_packing(open_run, tmp_path):
    write_good(tmp_path / "f.jsonl", 200)
    write_good(tmp_path / "g.jsonl", 201)
    row = {"prompt": "a [INST] b", "completion": "c"}
    (tmp_path / "h.jsonl").write_text((tmp_path / "f.jsonl").read_text() + "\n" + json.dumps(row))
    chosen = [
        ("f.jsonl", {}),
        ("g.jsonl", {}),
        ("h.jsonl", {"data__chat__literal_inst": "keep"}),
        ("h.jsonl", {"data__chat__literal_inst": "strip"}),
        ("f.jsonl", {"train__sequence_length": LENGTH + 1}),
    ]
    fingerprints = [
        open_run(tmp_path / name, **settings)[0].fingerprint for name, settings in chosen * 2
    ]
    assert fingerprints[:5] == fingerprints[5:] and len(set(fingerprints)) == 5


def test_what_is_left_out_is_said_with_counts(open_run, tmp_path):
    write_mixed_rows(tmp_path / "f.jsonl", num_rows=300, num_bad=15)
    long = {"prompt": "q", "completion": "long " * 50}, {"prompt": "long " * 50, "completion": "a"}
    with (tmp_path / "f.jsonl").open("a") as file:
        file.write("\n".join(map(json.dumps, long)))
    settings = {"data__max_bad_fraction": 0.1, "data__held_out_fraction": 0.001}
    _, said, _ = open_run(tmp_path / "f.jsonl", **settings)
    expected = (
        "15 bad rows, 2 conversations longer than a row (cut), "
        "1 without an answer to learn in a row's length"
    )
    assert expected in said
    _, said, _ = open_run(tmp_path / "f.jsonl", **settings, data__chat__long_rows="drop")
    assert "15 bad rows, 2 conversations longer than a row (dropped)" in said
    with pytest.raises(
        ConfigError, match=r"2 of \d+ conversations are longer than train.sequence_length=96"
    ):
        open_run(tmp_path / "f.jsonl", **settings, data__chat__long_rows="error")


def test_fields_that_are_not_read_are_named_at_every_start(open_run, tmp_path):
    rows = [json.loads(good_line(number)) | {"id": number, "[b]": 1} for number in range(50)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):  # The second time from the cache.
        assert "not read    [b] (50 rows), id (50)\n" in open_run(tmp_path / "f.jsonl")[1]
    write_good(tmp_path / "g.jsonl", 60)
    assert "not read" not in open_run(tmp_path / "g.jsonl")[1]


def to_evaluate(run, tokenizer) -> tuple[Any, EvalTask]:
    """What reading the conversations of a run needs of a model, and all of them as a task."""
    loaded = types.SimpleNamespace(
        tokenizer=tokenizer,
        config=run.config,
        mesh=run.mesh,
        model=types.SimpleNamespace(rules=AxisRules()),
        side_files=SideFiles(),
    )
    return loaded, EvalTask(run.config.data, "all", True, LENGTH, None)


def test_rows_that_are_too_short_for_a_conversation_are_named_by_the_flag_that_sets_their_length(
    open_run, tokenizer, tmp_path
):
    _, _, run = open_run(write_good(tmp_path / "f.jsonl", 50))
    loaded, task = to_evaluate(run, tokenizer)
    data = dataclasses.replace(task.data, chat=ChatConfig(long_rows="error"))
    task = dataclasses.replace(task, data=data, sequence_length=4)
    with pytest.raises(ConfigError, match=r"longer than --sequence_length=4, .*: raise it"):
        open_task(loaded, task, Processes())


def test_fields_that_are_not_read_are_named_where_a_model_is_evaluated(
    open_run, tokenizer, tmp_path, capsys
):
    rows = [json.loads(good_line(number)) | {"id": number} for number in range(50)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded, task = to_evaluate(open_run(tmp_path / "f.jsonl")[2], tokenizer)
    assert open_task(loaded, task, Processes()).counts
    assert "not read: id (50 rows)\n" in capsys.readouterr().err


def test_held_out_answers_are_judged_and_questions_given(open_run, tokenizer, tmp_path):
    data, _, run = open_run(write_good(tmp_path / "f.jsonl", 200), train__eval_sequences=4)
    with jax.set_mesh(run.mesh):
        figures = data.evaluate(cpu_model_maker(run.config)())
    assert 5 < figures["eval/loss"] < 8 and figures["eval/tokens"] > 0
    question = data.questions[0]
    assert tokenizer.decode(question.answer.tolist()).startswith("It is")
