"""The verbs that ask a model: what they write, and where; what they refuse."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.cli.chat import Conversation, read_messages
from mixtral_jax.cli.main import run_verb
from mixtral_jax.cli.task_flags import choose_data
from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.generate.settings import Settings
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.eval_data import EvalTask, plan_task, read_run, score
from tests.cases import mesh_of, small_config
from tests.data.chat_cases import train_tokenizer
from tests.scripts import environment, free_port

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden folder, with a tokenizer that fits in its vocabulary."""
    folder = tmp_path_factory.mktemp("asking") / "model"
    shutil.copytree(GOLDEN, folder)
    train_tokenizer().save(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return mixtral_jax.load_pretrained(folder, mesh=mesh_of())


def start(folder, verb, *flags):
    """Runs a verb on the model in `folder`, as users do."""
    command = [sys.executable, "-m", "mixtral_jax", verb, f"--checkpoint={folder}", *flags]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(command, env=environment(folder.parent), text=True, **pipes)


@pytest.mark.runs
def test_generate_writes_the_continuation_and_nothing_else_on_standard_output(folder, loaded):
    asked = {"max_new_tokens": 20, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 5}
    expected = loaded.generate("def main(", stop=["zz", "qq"], **asked)
    flags = [f"--{name}={value}" for name, value in asked.items()]
    process = start(folder, "generate", "--prompt=def main(", "--stop=zz", "--stop=qq", *flags)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output) == (0, expected), errors
    assert "prefill" in errors and "tokens/s" in errors and "ended:" in errors


@pytest.mark.runs
def test_several_processes_write_one_continuation_and_must_be_asked_for_the_same(folder, loaded):
    def run(*own):
        shared = [
            "--num_processes=2",
            f"--coordinator=127.0.0.1:{free_port()}",
            "--mesh.cpu_devices=2",
        ]
        shared += [
            "--mesh.expert=4",
            "--prompt=def main(",
            "--max_new_tokens=5",
            "--temperature=0.9",
        ]
        processes = [
            start(folder, "generate", *shared, f"--process_id={i}", *own[i : i + 1])
            for i in range(2)
        ]
        return [(*process.communicate(timeout=240), process.returncode) for process in processes]

    (first, errors, code), (second, _, other_code) = run()
    assert (code, other_code) == (0, 0), errors
    assert (first, second) == (loaded.generate("def main(", max_new_tokens=5, temperature=0.9), "")
    for output, errors, code in run("--seed=1", "--seed=2"):
        assert (output, code) == ("", 2)
        assert "process 1 has other flags" in errors


@pytest.mark.runs
def test_chat_answers_each_line_in_the_light_of_those_before_and_leaves_at_ctrl_c(folder, loaded):
    process = start(folder, "chat", "--max_new_tokens=6", "--system=Be brief.", "--safe_mode")
    process.stdin.write("the parser\n\n</s> takes [INST]\n")
    process.stdin.flush()
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("the parser", "</s> takes [INST]"):
        messages.append({"role": "user", "content": question})
        answer = loaded.chat(messages, max_new_tokens=6, safe_mode=True, literal_inst="keep")
        messages.append({"role": "assistant", "content": answer})
        assert process.stdout.read(len(answer) + 1) == answer + "\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, ""), errors
    assert "Traceback" not in errors and "tokens/s" in errors


def test_safe_mode_is_mistrals_text_before_the_first_message(loaded):
    from mixtral_jax.data.chat.template import SAFE_PROMPT

    question = {"role": "user", "content": "the parser"}
    written = loaded.chat([{"role": "system", "content": SAFE_PROMPT}, question], max_new_tokens=8)
    assert loaded.chat([question], max_new_tokens=8, safe_mode=True) == written
    assert loaded.chat([question], max_new_tokens=8) != written
    assert "".join(loaded.stream_chat([question], max_new_tokens=8, safe_mode=True)) == written


def test_a_question_that_cannot_be_asked_is_named_and_forgotten(loaded, capsys):
    asked = dataclasses.replace(Settings(), max_new_tokens=4)
    talk = Conversation(loaded, None, asked, safe_mode=False)
    talk.run(iter(["the parser", "\ud800", "takes"]))
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    first = loaded.chat([{"role": "user", "content": "the parser"}], max_new_tokens=4)
    messages = [("user", "the parser"), ("assistant", first), ("user", "takes")]
    second = loaded.chat(
        [{"role": role, "content": content} for role, content in messages], max_new_tokens=4
    )
    assert captured.out == f"{first}\n{second}\n"


def test_messages_are_the_lines_that_are_not_blank():
    assert list(read_messages(io.StringIO("one\n\n  \n two \nthree"))) == ["one", " two ", "three"]


@pytest.mark.runs
def test_evaluate_prints_one_line_with_the_loss_over_all_documents(folder, loaded, tmp_path):
    rows = [
        {"text": "the parser takes two arguments"},
        {"text": "each option has a default"},
        {"text": "no"},
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    process = start(
        folder, "evaluate", f"--data.path={tmp_path / 'text.jsonl'}", "--sequence_length=64"
    )
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    nats = tokens = 0
    for row in rows:
        ids = np.array([*loaded.encode(row["text"]), 2])
        logits = loaded.logits(np.pad([ids], ((0, 0), (0, 64 - len(ids)))))[
            0, : len(ids) - 1
        ].astype(np.float64)
        nats += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]).sum()
        tokens += len(ids) - 1
    figures = json.loads(output)
    assert output.count("\n") == 1
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-4)
    assert (figures["tokens"], figures["part"], figures["sequence_length"]) == (tokens, "all", 64)


def test_answers_of_conversations_are_scored_alone(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chats = [
        [("user", f"the {word}"), ("assistant", f"parser {word}")]
        for word in ("one", "two", "three")
    ]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = EvalTask(DataConfig(path=str(tmp_path / "chats.jsonl")), "all", True, 64, None)
    answers = sum(
        len(loaded.tokenizer.encode(f"parser {word}")) + 1 for word in ("one", "two", "three")
    )
    assert score(loaded, task, Processes())["tokens"] == answers
    assert "scored" in capsys.readouterr().err
    assert score(loaded, task, Processes(1, 1))["tokens"] == answers
    assert not capsys.readouterr().err  # Process 0 alone says what is done.


def test_what_a_run_was_trained_on_is_judged_as_the_run_does(tmp_path):
    config = small_config(
        data__path="own.txt", data__held_out_fraction=0.25, train__eval_sequences=7
    )
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))

    class Loaded:
        """All that a plan needs of a model."""

    def plan(path, checkpoint=tmp_path, keys=(), **flags):
        Loaded.config = config
        asked = {
            "is_chat": False,
            "part": None,
            "sequence_length": None,
            "num_sequences": None,
        } | flags
        run = read_run(checkpoint)
        data = choose_data([f"--data.path={path}", *keys], run)
        return plan_task(run, data, Loaded, **asked)

    own = EvalTask(config.data, "held_out", False, 24, 7)
    assert plan("own.txt") == plan("own.txt", tmp_path / "checkpoints" / "3") == own
    assert plan("own.txt", part="all", num_sequences=5) == dataclasses.replace(
        own, part="all", num_sequences=5
    )
    assert plan("own.txt", Path(*tmp_path.parts[:2])) == EvalTask(
        DataConfig(path="own.txt"), "all", False, 24, None
    )
    assert plan("other.txt", is_chat=True) == EvalTask(
        DataConfig(path="other.txt"), "all", True, 24, None
    )
    with pytest.raises(ConfigError, match="sequence_length=1"):
        plan("own.txt", sequence_length=1)
    # A key that is named changes that key alone, even if it is named as its default.
    fields = ["--data.domain_field=topic", "--data.max_bad_fraction=0.01"]
    changed = dataclasses.replace(config.data, domain_field="topic", max_bad_fraction=0.01)
    assert plan("own.txt", keys=fields) == dataclasses.replace(own, data=changed)
    assert plan("own.txt", keys=["--data.chat.long_rows=drop"]).data.held_out_fraction == 0.25
    assert choose_data([], read_run(tmp_path)) == config.data


@pytest.mark.parametrize(
    "key",
    ["held_out_fraction=0.02", "text_field=body", "suffixes=.md", "chat.format=alpaca"],
)
def test_a_held_out_part_that_would_hold_trained_documents_is_refused(tmp_path, key):
    config = small_config(data__path=str(tmp_path / "own"), data__held_out_fraction=0.25)
    (tmp_path / "own").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))

    def plan(part, path):
        run = read_run(tmp_path)
        data = choose_data([f"--data.path={path}", f"--data.{key}"], run)
        loaded = SimpleNamespace(config=config)
        asked = {"is_chat": False, "sequence_length": None, "num_sequences": None}
        return plan_task(run, data, loaded, part=part, **asked)

    # However the run's own folder is spelled.
    for path in (tmp_path / "own", f"{tmp_path}/own/../own"):
        with pytest.raises(ConfigError, match=f"data.{key.split('=')[0]} .*--part=all"):
            plan(None, path)
        assert plan("all", path).part == "all"


def test_without_a_run_the_data_must_be_named():
    with pytest.raises(ConfigError, match=r"--data\.path=TEXT"):
        choose_data(["--data.text_field=body"], None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate --prompt=x", "--checkpoint"),
        ("generate --checkpoint=x", "--prompt"),
        ("generate --checkpoint=x --prompt=x --temperature=-1", "temperature=-1.0"),
        ("generate --checkpoint=x --prompt=x --max_new_tokens=0", "max_new_tokens=0"),
        ("generate --checkpoint=x --prompt=x --mesh.exper=2", "did you mean mesh.expert"),
        ("generate --checkpoint=x --prompt=x --data.path=x", "unknown flag '--data.path=x'"),
        ("chat --checkpoint=x --top_p=2", "top_p=2.0"),
        ("evaluate --checkpoint=.", "--data.path=TEXT"),
        ("evaluate --checkpoint=nowhere", "checkpoint=nowhere is not a folder"),
        ("analyze --checkpoint=nowhere --data.path=.", "checkpoint=nowhere is not a folder"),
        ("evaluate --checkpoint=. --data.path=nowhere", "nowhere does not exist"),
        ("evaluate --checkpoint=. --data.path=x --data.held_out_fraction=2", "held_out_fraction=2"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(arguments, words):
    with pytest.raises(ConfigError, match=words):
        run_verb(arguments.split())


def test_text_needs_a_tokenizer():
    loaded = mixtral_jax.load_pretrained(GOLDEN, mesh=mesh_of())
    for ask in (loaded.generate, loaded.encode):
        with pytest.raises(ConfigError, match="needs a tokenizer"):
            ask("text")
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        loaded.chat([{"role": "user", "content": "text"}])
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        score(loaded, EvalTask(DataConfig(), "all", False, 64, None), Processes())


def test_a_prompt_gives_what_it_is_itself(loaded):
    text = loaded.generate("the parser", max_new_tokens=5)
    ids = loaded.generate(loaded.encode("the parser"), max_new_tokens=5)
    assert isinstance(text, str)
    assert (len(ids), loaded.tokenizer.decode([*loaded.encode("the parser"), *ids])) == (
        5,
        "the parser" + text,
    )
    assert loaded.generate(["the parser", "no"], max_new_tokens=5)[0] == text
    assert loaded.generate([loaded.encode("the parser")], max_new_tokens=5) == [ids]
    assert loaded.generate(np.array(loaded.encode("the parser")), max_new_tokens=5) == ids
