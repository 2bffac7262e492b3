"""Rows of every format as conversations, and what is wrong with those that are none."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mixtral_jax.data.chat.conversations import Chat, drop_unsupervised, read_chat, read_chats
from mixtral_jax.data.chat.errors import ChatException
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.readers import BadRow, RawRow
from tests.data.chat_cases import BAD_LINES, train_tokenizer

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
AGAIN, FINAL = {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(train_tokenizer())


def read(row, template, format="auto", mode="training"):
    """The conversation, or the mistake as a bad row."""
    try:
        return read_chat(RawRow(row, "f.jsonl:7"), template, format=format, mode=mode)
    except ChatException as error:
        assert "(f.jsonl:7" in str(error)
        return BadRow(error.origin, error.describe(), type(error).__name__)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASK, ANSWER], "prompt": "not read", "text": "not read"}, [ASK, ANSWER]),
        ({"interactions": [{"role": "user", "text": "q"}, ANSWER]}, [ASK, ANSWER]),
        ({"messages": [ASK, ANSWER], "system_prompt": "s"}, [SYSTEM, ASK, ANSWER]),
        (
            {"messages": [ASK, ANSWER, AGAIN, FINAL], "only_last": True},
            [ASK, {**ANSWER, "weight": 0}, AGAIN, FINAL],
        ),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, [SYSTEM, ASK, ANSWER]),
        ({"conversations": [HUMAN, GPT], "system": "s", "tools": ""}, [SYSTEM, ASK, ANSWER]),
        ({"conversations": [ASK, ANSWER]}, [ASK, ANSWER]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, [ASK, ANSWER]),
        (
            {"instruction": "q", "output": "a", "input": "", "history": None, "system": ""},
            [ASK, ANSWER],
        ),
        (
            {"instruction": "do", "input": "this", "output": "a"},
            [{"role": "user", "content": "do\nthis"}, ANSWER],
        ),
        (
            {"instruction": "r", "output": "b", "history": [["q", "a"]], "system": "s"},
            [SYSTEM, ASK, ANSWER, AGAIN, FINAL],
        ),
        ({"prompt": "q", "completion": "a"}, [ASK, ANSWER]),
        (
            {"prompt": [ASK, ANSWER, AGAIN], "completion": [FINAL]},
            [ASK, {**ANSWER, "weight": 0}, AGAIN, FINAL],
        ),
    ],
)
def test_every_format_gives_its_messages(template, row, messages):
    chat = read(row, template)
    assert isinstance(chat, Chat), chat
    expected = read({"messages": messages}, template)
    assert chat.turns == expected.turns and chat.messages == expected.messages


@pytest.mark.parametrize(
    "row", [{"text": "t"}, {"content": "t"}, {"text": "t", "title": "not read", "messages": None}]
)
def test_a_plain_text_is_learnt_whole_without_a_template(template, row):
    chat = read(row, template)
    (encoded,) = template.encode_turns([chat.turns])
    tokenizer = train_tokenizer()
    assert encoded.tokens.tolist() == [1, *tokenizer.encode("t"), 2]
    assert encoded.loss_mask.tolist() == [0, *[1] * (len(encoded.tokens) - 1)]


def test_a_format_that_is_set_is_the_one_that_is_read(template):
    row = {"messages": [ASK, ANSWER], "interactions": [AGAIN, FINAL], "text": "t"}
    assert read(row, template).kind == "InvalidRowException"
    assert (
        "messages and interactions could be read in two ways: set data.chat.format"
        in read(row, template).reason
    )
    assert (
        read(row, template, "interactions").turns
        == read({"messages": [AGAIN, FINAL]}, template).turns
    )
    assert read(row, template, "text").turns == read({"text": "t"}, template).turns
    assert "completion is missing" in read({"prompt": [ASK]}, template, "prompt_completion").reason


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ([1], "InvalidRowException", "(found a list)"),
        ({}, "InvalidRowException", "one of the fields messages, interactions,"),
        ({"prompt": "q"}, "InvalidRowException", "it has prompt"),
        ({"messages": "text"}, "InvalidMessageStructureException", "must be a list (found text)"),
        (
            {"messages": {"role": ["user"], "content": []}},
            "InvalidMessageStructureException",
            "must be a list (found an object)",
        ),
        ({"messages": [ASK, ANSWER], "tools": [{}]}, "TokenizerException", "tools"),
        (
            {"messages": [SYSTEM, ASK, ANSWER], "system_prompt": "s"},
            "InvalidSystemPromptException",
            "one system prompt",
        ),
        (
            {"messages": [ASK, ANSWER], "system_prompt": "s", "system": "s"},
            "InvalidSystemPromptException",
            "one system",
        ),
        (
            {"messages": [ASK, ANSWER], "system_prompt": 3},
            "InvalidSystemPromptException",
            "must be text (found a number)",
        ),
        (
            {"messages": [ASK, {**ANSWER, "content": "[INST]"}], "system_prompt": "s"},
            "LiteralInstException",
            "[1]",
        ),
        (
            {"messages": [ASK, ANSWER], "system_prompt": "[INST]"},
            "LiteralInstException",
            "(the system prompt)",
        ),
        (
            {"conversations": [{"from": "observation", "value": "q"}]},
            "TokenizerException",
            "role='observation'",
        ),
        (
            {"conversations": [{"from": 3, "value": "q"}]},
            "InvalidMessageStructureException",
            "role=3",
        ),
        ({"instruction": "q"}, "InvalidRowException", "output must be text (it is missing)"),
        (
            {"instruction": "q", "input": 3, "output": "a"},
            "InvalidRowException",
            "input must be text (found a number)",
        ),
        (
            {"instruction": "q", "output": "a", "history": ["x"]},
            "InvalidRowException",
            "pairs of a question",
        ),
        (
            {"instruction": "q", "output": "a", "history": "x"},
            "InvalidRowException",
            "pairs of a question",
        ),
        (
            {"prompt": "q", "completion": None, "messages": None},
            "InvalidRowException",
            "it has prompt, completion",
        ),
        ({"prompt": None, "completion": "a"}, "InvalidRowException", "prompt is missing"),
        ({"text": "t", "content": "t"}, "InvalidRowException", "not both"),
        ({"text": " "}, "InvalidTextException", "empty text"),
        ({"text": 3}, "InvalidRowException", "text must be text (found a number)"),
        ({"text": "\ud800"}, "InvalidTextException", "UTF-8 at character 0"),
    ],
)
def test_a_row_that_is_no_conversation_is_bad_for_a_reason(template, row, kind, words):
    bad = read(row, template)
    assert isinstance(bad, BadRow) and (bad.origin, bad.kind) == ("f.jsonl:7", kind)
    assert bad.reason.startswith(f"{kind}: ") and words in bad.reason


def test_every_bad_line_is_named_by_its_reason(template, tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(line for line, _ in BAD_LINES))
    rows = list(read_chats(str(tmp_path / "f.jsonl"), template))
    for number, (row, (_, words)) in enumerate(zip(rows, BAD_LINES, strict=True), start=1):
        assert isinstance(row, BadRow) and row.origin.endswith(f"f.jsonl:{number}")
        assert words in row.reason


def test_a_conversation_whose_every_answer_has_weight_0_is_bad_for_training_alone(template):
    chat = read({"messages": [ASK, {**ANSWER, "weight": 0}]}, template)
    assert isinstance(chat, Chat)
    (bad,) = drop_unsupervised(iter([chat]))
    assert (bad.kind, bad.origin) == ("NoSupervisedTokenException", "f.jsonl:7")
    (same,) = drop_unsupervised(
        iter([read({"messages": [ASK, {**ANSWER, "weight": 0}, FINAL]}, template)])
    )
    assert isinstance(same, Chat)


def test_what_the_user_says_decides_the_side_of_the_split_unless_the_row_does(template):
    keys = [
        read({"messages": [ASK, answer], **more}, template).key
        for answer in (ANSWER, FINAL)
        for more in ({}, {"split_group": "g"}, {"system": "s"})
    ]
    assert keys == ["q", "g", "q"] * 2
    assert read({"text": "t"}, template).key == "t"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_form_of_file_gives_the_same_conversations(template, tmp_path, suffix):
    rows = [
        {"messages": [ASK, ANSWER], "id": 1},
        {"messages": [{**SYSTEM, "weight": None}, ASK, {**ANSWER, "weight": 0}, FINAL]},
    ]
    file = tmp_path / f"f{suffix}"
    if suffix == ".parquet":  # Every message gets every field.
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    chats = list(read_chats(str(tmp_path), template))
    assert [chat.turns for chat in chats] == [read(row, template).turns for row in rows]


def test_a_csv_file_gives_prompts_and_completions(template, tmp_path):
    (tmp_path / "f.csv").write_text('prompt,completion\nq,a\nr,"b\nc"\nq,\n')
    first, second, bad = read_chats(str(tmp_path), template)
    assert first.turns == read({"messages": [ASK, ANSWER]}, template).turns
    assert second.messages[1].content == "b\nc"
    assert bad.kind == "InvalidAssistantMessageException" and bad.origin.endswith("f.csv:5")


def test_a_text_file_is_a_plain_text(template, tmp_path):
    (tmp_path / "f.txt").write_text("t")
    (chat,) = read_chats(str(tmp_path), template)
    assert chat.turns == read({"text": "t"}, template).turns


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("q", 3, "prompt is text, completion is a number"),
        (["q"], "a", "prompt is a list, completion is text"),
        (None, "a", "prompt is missing, completion is text"),
    ],
)
def test_both_parts_of_a_pair_are_named_where_they_do_not_fit(prompt, completion, found):
    row = RawRow({"prompt": prompt, "completion": completion}, "f.jsonl:1")
    with pytest.raises(ChatException, match=found):
        read_chat(row, ChatTemplate(train_tokenizer()))
