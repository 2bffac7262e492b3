"""What verbs say about files that they do not read, and held-out data that are named for them."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest

from mixtral_jax.cli.flags import run_command
from mixtral_jax.cli.main import run_verb
from mixtral_jax.cli.task_flags import choose_data
from mixtral_jax.config import ConfigError
from mixtral_jax.runs.eval_data import plan_task, read_run
from tests.cases import small_config
from tests.data.chat_cases import good_line, train_tokenizer


@pytest.mark.parametrize("verb", ["inspect", "validate"])
def test_what_a_folder_holds_besides_is_said_once_and_not_on_standard_output(
    capsys, tmp_path, verb
):
    train_tokenizer().save(tmp_path / "tokenizer.model")
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(["train.JSONL", "test.jsonl", "README.md"]):
        (folder / name).write_bytes(good_line(number))
    assert run_verb(["data", verb, str(folder), f"--tokenizer={tmp_path}"]) == 0
    printed = capsys.readouterr()
    assert printed.err == (
        f"CHATS={folder}: not read: split test: 1 (test.jsonl); other suffixes: 1 (README.md)\n"
    )
    assert "test.jsonl" not in printed.out


@pytest.mark.parametrize("verb", ["inspect", "validate"])
def test_names_that_are_not_utf8_can_be_printed(capsys, monkeypatch, tmp_path, verb):
    train_tokenizer().save(tmp_path / "tokenizer.model")
    file = tmp_path / os.fsdecode(b"caf\xe9.csv")
    file.write_bytes(b"prompt,completion,pr\xe9nom\nq,a,n\n,,n\n")
    monkeypatch.setattr(
        "sys.argv", ["mixtral-jax", "data", verb, str(file), f"--tokenizer={tmp_path}"]
    )
    with pytest.raises(SystemExit):
        run_command(run_verb)
    printed = capsys.readouterr().out
    assert "/caf\\udce9.csv:3" in printed
    assert verb == "inspect" or "not read: pr\\udce9nom (1 row)" in printed


def test_held_out_data_of_ones_own_may_be_named_for_any_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()

    def plan(own, *keys):
        config = small_config(data__path="own.txt", data__held_out=own)
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        run = read_run(tmp_path)
        data = choose_data(keys, run)
        asked = {"is_chat": False, "sequence_length": None, "num_sequences": None, "part": None}
        return plan_task(run, data, SimpleNamespace(config=config), **asked)

    assert plan("b.txt").data.held_out == "b.txt"
    for own in (None, "b.txt"):
        task = plan(own, "--data.held_out=c.txt", "--data.text_field=body")
        assert (task.part, task.data.held_out) == ("held_out", "c.txt")
    with pytest.raises(ConfigError, match=r"data.held_out \('b.txt' -> None\): with this change"):
        plan("b.txt", "--data.held_out=None")
