"""`data inspect` and `data validate`: every row by name and in order, and golden conversations."""

import json
import random
import time

import pytest

from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ConfigError
from mixtral_jax.data.chat.template import ChatTemplate
from tests.data.chat_cases import (
    GOLDEN,
    UNREAD_NAMES,
    mode_of,
    random_value,
    row_of,
    train_tokenizer,
    write_mixed_rows,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers of both templates, and the files that they lie in."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {"v1": train_tokenizer(), "v3": train_tokenizer(control_symbols=["[INST]", "[/INST]"])}
    for version, tokenizer in made.items():
        tokenizer.save(folder / version / "tokenizer.model")
    return {version: (tokenizer, folder / version) for version, tokenizer in made.items()}


def inspect(capsys, *arguments):
    """The lines of JSON, parsed; and the exit code."""
    code = run_verb(["data", "inspect", *map(str, arguments), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()], code


@pytest.mark.parametrize("mode", ["training", "serving"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_inspect_gives_each_golden_conversation_its_ids_or_its_error(
    capsys, tmp_path, tokenizers, version, mode
):
    cases = [case for case in GOLDEN if mode_of(case) == mode]
    (tmp_path / "f.jsonl").write_text(
        "".join(json.dumps({"messages": case["messages"]}) + "\n" for case in cases)
    )
    tokenizer, folder = tokenizers[version]
    flags = [
        "--literal_inst=keep",
        f"--tokenizer={folder}",
        f"--template={version}",
        f"--mode={mode}",
    ]
    lines, code = inspect(capsys, tmp_path / "f.jsonl", *flags)
    assert code == 0 and [line["index"] for line in lines] == list(range(len(cases)))
    template = ChatTemplate(tokenizer, version, literal_inst="keep")
    for line, case in zip(lines, cases, strict=True):
        if expected := case.get(f"error_{version}"):
            assert line["error"].startswith(expected) and line["origin"].endswith(
                f"f.jsonl:{line['index'] + 1}"
            )
            continue
        chat = template.encode(case["messages"], mode=mode)
        assert line == {
            "index": line["index"],
            "tokens": chat.tokens.tolist(),
            "loss_mask": chat.loss_mask.tolist(),
        }
        assert line["tokens"].count(2) == case[f"tokens_{version}"].count(2)


def test_inspect_shows_what_is_learnt_behind_a_plus(capsys, tmp_path, tokenizers):
    row = {
        "messages": [
            {"role": "user", "content": "[b]x[/b]"},
            {"role": "assistant", "content": "</s>\n"},
        ]
    }
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n{}\n")
    run_verb(["data", "inspect", str(tmp_path / "f.jsonl"), f"--tokenizer={tokenizers['v1'][1]}"])
    head, asked, answered, bad, reason = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{tmp_path}/f.jsonl:1  ") and head.endswith(" to be learnt")
    asked, answered = (
        line.replace(" ", "").replace("<0x2F>", "/").replace("<0x3C>", "<")
        for line in (asked, answered)
    )
    assert asked == "-<s>\u2581[INST]\u2581[b]x[/b]\u2581[/INST]"
    assert answered == "+\u2581</s><0x0A></s>"
    assert bad.endswith(":2") and reason.startswith("! InvalidRowException: a row must have one of")


def test_settings_of_inspect_reach_the_template(capsys, tmp_path, tokenizers):
    row = {"prompt": "a [INST] b", "completion": "c", "text": "t"}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    flags = [tmp_path / "f.jsonl", f"--tokenizer={tokenizers['v1'][1] / 'tokenizer.model'}"]
    (rejected,), _ = inspect(capsys, *flags)
    assert rejected["error"].startswith("LiteralInstException")
    tokens = [
        inspect(capsys, *flags, *more)[0][0]["tokens"]
        for more in (
            ["--literal_inst=keep"],
            ["--literal_inst=strip"],
            ["--format=text"],
            ["--format=text", "--mode=serving"],
        )
    ]
    assert len({tuple(ids) for ids in tokens}) == 4 and tokens[2] == [*tokens[3], 2]


def test_validate_names_each_of_200_bad_rows_among_10000_in_seconds(capsys, tmp_path, tokenizers):
    wrong = write_mixed_rows(tmp_path / "f.jsonl", num_rows=10_000, num_bad=200)
    start = time.monotonic()
    code = run_verb(
        ["data", "validate", str(tmp_path / "f.jsonl"), f"--tokenizer={tokenizers['v1'][1]}"]
    )
    assert time.monotonic() - start < 20  # 2 alone on two cores.
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith(str(tmp_path))]
    assert code == 1 and len(named) == 200
    for line, (number, reason) in zip(named, sorted(wrong.items()), strict=True):
        assert line.startswith(f"{tmp_path}/f.jsonl:{number}: ") and reason in line
    assert "200 of 10,000 rows are bad" in lines
    counts = {
        line.partition(" x ")[2]: int(line.partition(" x ")[0])
        for line in lines[200:]
        if " x " in line
    }
    assert sum(counts.values()) == 200 and counts["invalid JSON"] == 14


def test_validate_sums_up_good_rows(capsys, tmp_path, tokenizers):
    rows = [{"prompt": "q" * number, "completion": "a"} for number in (1, 100)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [str(tmp_path / "f.jsonl"), f"--tokenizer={tokenizers['v1'][1]}"]
    chats, _ = inspect(capsys, *flags)
    num_tokens = [len(chat["tokens"]) for chat in chats]
    num_supervised = sum(sum(chat["loss_mask"]) for chat in chats)
    assert run_verb(["data", "validate", *flags, "--sequence_length=50"]) == 0
    long, bad, totals, longest = capsys.readouterr().out.splitlines()
    assert long.startswith(f"{tmp_path}/f.jsonl:2: {num_tokens[1]} tokens are longer than a row")
    assert bad == "0 of 2 rows are bad"
    assert totals.startswith(
        f"{sum(num_tokens)} tokens in the others, {num_supervised} of them to be learnt ("
    )
    assert longest == f"the longest has {num_tokens[1]} tokens, 1 longer than a row"


def test_a_row_without_a_token_to_learn_is_bad_in_training_alone(capsys, tmp_path, tokenizers):
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "weight": 0},
        ]
    }
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    flags = [str(tmp_path / "f.jsonl"), f"--tokenizer={tokenizers['v1'][1]}"]
    assert run_verb(["data", "validate", *flags]) == 1
    capsys.readouterr()
    ((shown,), _), ((served,), _) = (
        inspect(capsys, *flags),
        inspect(capsys, *flags, "--mode=serving"),
    )
    assert "NoSupervisedToken" in shown["error"] and "tokens" not in shown
    # Serving refuses it for ending with an answer.
    assert served["error"] != shown["error"]
    row["messages"].append({"role": "user", "content": "r"})
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    assert run_verb(["data", "validate", *flags, "--mode=serving"]) == 0


@pytest.mark.parametrize("level", ["row", "message", "chunk"])
def test_validate_lists_every_field_that_is_not_read(capsys, tmp_path, tokenizers, level):
    rng = random.Random(level)
    rows = []
    for name in UNREAD_NAMES:
        row = row_of("messages")
        chunk = {"type": "text", "text": "q"}
        row["messages"][0]["content"] = [chunk]
        places = {"row": row, "message": row["messages"][1], "chunk": chunk}
        places[level][name] = random_value(rng)
        rows += [row, row]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [str(tmp_path / "f.jsonl"), f"--tokenizer={tokenizers['v1'][1]}"]
    assert run_verb(["data", "validate", *flags]) == 0
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("not read: ")
    )
    of = "" if level == "row" else f" of a {level}"
    listed = line.removeprefix("not read: ").replace(" rows)", ")").split(", ")
    assert sorted(listed) == sorted(f"{name}{of} (2)" for name in UNREAD_NAMES)


def test_fields_are_named_for_both_verbs(capsys, tmp_path, tokenizers):
    (tmp_path / "f.jsonl").write_text('{"question": "q", "answer": "a", "id": 3}')
    (tmp_path / "g.jsonl").write_text(json.dumps(row_of("messages")))
    tokenizer = f"--tokenizer={tokenizers['v1'][1]}"
    named = "--fields=question:user,answer:assistant"
    rows = inspect(capsys, tmp_path / "f.jsonl", tokenizer, named)
    assert rows == inspect(capsys, tmp_path / "g.jsonl", tokenizer)
    assert run_verb(["data", "validate", str(tmp_path / "f.jsonl"), tokenizer, named]) == 0
    assert "not read: id (1 row)" in capsys.readouterr().out.splitlines()
    assert run_verb(["data", "validate", str(tmp_path / "f.jsonl"), tokenizer]) == 1
    printed = capsys.readouterr().out
    assert "with --fields, such as question:user" in printed and "data.chat" not in printed


@pytest.mark.parametrize("verb", ["inspect", "validate"])
@pytest.mark.parametrize(
    ("row", "flag"),
    [
        ({"functions": ["f"]}, "set --fields=functions:ignore"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "set --format to one of them"),
    ],
)
def test_the_reason_of_a_bad_row_names_flags_that_the_verb_takes(
    capsys, tmp_path, tokenizers, verb, row, flag
):
    (tmp_path / "f.jsonl").write_text(json.dumps(row_of("messages") | row))
    run_verb(["data", verb, str(tmp_path / "f.jsonl"), f"--tokenizer={tokenizers['v1'][1]}"])
    printed = " ".join(capsys.readouterr().out.split())
    assert flag in printed and "data.chat" not in printed


def test_validate_checks_everything_but_tokens_without_a_tokenizer(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wrong = write_mixed_rows(tmp_path / "f.jsonl", num_rows=300, num_bad=30)
    for flags in ([], ["--template=v3"]):
        # Words that look like those of v1 are harmless in v3.
        expected = [
            number for number, reason in wrong.items() if not flags or reason != "LiteralInst"
        ]
        assert run_verb(["data", "validate", str(tmp_path / "f.jsonl"), *flags]) == 1
        *named, last = capsys.readouterr().out.splitlines()
        found = [line.split(":")[1] for line in named if line.startswith(str(tmp_path))]
        assert [int(number) for number in found] == expected
        assert f"{len(expected)} of 300 rows are bad" in named
        assert last.startswith("tokens are not counted: ") and "--tokenizer=DIR" in last
    for verb, flag in (
        ("inspect", "--mode=training"),
        ("validate", "--tokenizer=mixtral"),
        ("validate", "--sequence_length=50"),
    ):
        with pytest.raises(ConfigError, match="needs the package mistral-common") as error:
            run_verb(["data", verb, str(tmp_path / "f.jsonl"), flag])
        needs_it = "leave out --sequence_length, which needs a tokenizer" in str(error.value)
        assert needs_it == flag.startswith("--sequence_length")


@pytest.mark.parametrize("verb", ["inspect", "validate"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.json"])
def test_a_file_without_a_row_is_refused_by_name(tmp_path, tokenizers, verb, name):
    (tmp_path / name).write_text({"f.csv": "prompt,completion\n", "f.json": "[]"}.get(name, "\n"))
    with pytest.raises(ConfigError, match=rf"{name} holds no row"):
        run_verb(["data", verb, str(tmp_path / name), f"--tokenizer={tokenizers['v1'][1]}"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there are: data inspect, data validate"),
        (["inspect"], "CHATS"),
        (["inspect", "f.jsonl", "--tokens=3"], "--tokens=3"),
        (["inspect", "f.jsonl", "--tokenizer=train:400"], "name the run's workdir"),
        (
            ["inspect", "f.jsonl", "--tokenizer=nowhere.model"],
            "nowhere.model: no such file; give a .* .model file, mixtral, or mixtral-v3$",
        ),
        (["inspect", "f.jsonl", "--tokenizer=/"], "=/: a folder without tokenizer.model; give"),
        (["validate", "f.jsonl", "--sequence_length=1"], "at least 2"),
        (["validate", "f.jsonl", "--fields=q"], "^--fields: 'q' must be NAME:MEANING"),
    ],
)
def test_a_wrong_flag_is_answered_with_what_would_be_right(arguments, words):
    with pytest.raises(ConfigError, match=words):
        run_verb(["data", *arguments])


def test_a_template_that_does_not_fit_the_tokenizer_and_a_file_that_is_not_there_are_refused(
    tmp_path, tokenizers
):
    flag = f"--tokenizer={tokenizers['v1'][1]}"
    with pytest.raises(ConfigError, match="v3 needs a tokenizer with control tokens"):
        run_verb(["data", "inspect", "f.jsonl", flag, "--template=v3"])
    with pytest.raises(ConfigError, match="does not exist"):
        run_verb(["data", "inspect", str(tmp_path / "f.jsonl"), flag])


def test_data_without_a_verb_lists_them(capsys):
    assert run_verb(["data"]) == 0
    assert "data inspect CHATS" in capsys.readouterr().out
