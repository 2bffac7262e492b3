"""A base is asked in text, and what it said is kept for the same question and for no other."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.data.chat.prepare import Question
from mixtral_jax.runs import answers
from mixtral_jax.runs.answers import Answer, Answers, ask, ask_base
from tests.cases import make_run, mesh_of, small_config
from tests.checkpoint.side_folders import tokenizer, write


@dataclasses.dataclass(frozen=True)
class Data:
    """All that is asked of conversations."""

    fingerprint: str
    held_out_fingerprint: str


def base_of(folder, source):
    return types.SimpleNamespace(folder=Path(folder), weights=types.SimpleNamespace(source=source))


def test_a_base_is_asked_once_until_it_or_the_conversations_change(tmp_path, monkeypatch):
    said = [Answers(float(number), 0.5, [Answer("caf\u00e9 \ufffd", True)]) for number in range(5)]
    left = iter(said)
    monkeypatch.setattr(answers, "ask", lambda *_: next(left))
    run = make_run(small_config(), mesh_of(), tmp_path)
    questions = [
        ("a", "step 3 of a run", "f", "h"),
        ("a", "step 4 of a run", "f", "h"),
        ("b", "step 4 of a run", "f", "h"),
        ("b", "step 4 of a run", "g", "h"),
        ("b", "step 4 of a run", "g", "i"),
    ]
    for expected, (folder, source, *fingerprints) in zip(said, questions, strict=True):
        for _ in range(2):
            assert ask_base(base_of(folder, source), run, Data(*fingerprints)) == expected
    with pytest.raises(StopIteration):
        next(left)


def test_a_base_that_came_without_a_tokenizer_answers_in_text(tmp_path):
    write(tmp_path, {})
    (tmp_path / "tokenizer.model").unlink()
    data = types.SimpleNamespace(
        questions=[Question(np.array([1, 5]), np.array([6, 2]))],
        tokenizer=tokenizer(),
        evaluate=lambda model: {"eval/loss": 1.0, "eval/bits_per_byte": 0.5},
    )
    run = make_run(small_config(train__sequence_length=2), mesh_of(), tmp_path)
    (answer,) = ask(tmp_path, run, data).answers
    assert isinstance(answer.text, str)
