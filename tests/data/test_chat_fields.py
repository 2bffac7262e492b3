"""Fields that no format reads: refused by name, honoured, named by the user, or listed."""

import random
from pathlib import Path

import pytest

from mixtral_jax.config import ChatConfig, ConfigError, parse_fields
from mixtral_jax.data.chat.conversations import Chat, read_chat, read_chats
from mixtral_jax.data.chat.errors import ChatException
from mixtral_jax.data.chat.refused import QUESTION_PARTS, REFUSED
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.field_names import describe_unread
from mixtral_jax.data.marks import MARKS
from mixtral_jax.data.readers import BadRow, RawRow
from tests.data.chat_cases import UNREAD_NAMES, random_value, row_of, train_tokenizer, write_table

FORMATS = ["messages", "interactions", "conversations", "alpaca", "prompt_completion", "text"]
# Where a field is added: to the row, or to a message, or to a chunk of one.
LEVELS = {
    "row": ["messages", "interactions", "conversations", "alpaca", "prompt_completion", "text"],
    "message": ["messages", "interactions", "conversations", "prompts"],
    "chunk": ["messages", "interactions", "prompts"],
}
PLACES = [(level, form) for level, forms in LEVELS.items() for form in forms]


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(train_tokenizer())


def read(row, template, **settings):
    """The conversation, or the mistake as a bad row."""
    try:
        return read_chat(RawRow(row, "f.jsonl:7"), template, **settings)
    except ChatException as error:
        return BadRow(error.origin, error.describe(), type(error).__name__)


def places_of(row, level):
    """The objects of a row that fields of a level can be added to."""
    if level == "row":
        return [row]
    lists = [value for value in row.values() if isinstance(value, list)]
    messages = [message for messages in lists for message in messages]
    if level == "message":
        return messages
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return [message["content"][0] for message in messages]


@pytest.mark.parametrize(("level", "form"), PLACES)
def test_a_field_that_nothing_reads_makes_the_row_bad_by_name_or_is_listed(template, level, form):
    rng = random.Random(f"{level} {form}")
    plain = read(row_of(form), template)
    names = [*UNREAD_NAMES, *REFUSED, *QUESTION_PARTS]
    names += ["".join(rng.choices("abcdefghij_", k=8)) for _ in range(50)]
    for name in names:
        row = row_of(form)
        target = rng.choice(places_of(row, level))
        if name in target or (name == "prefix" and level == "message"):  # It is read.
            continue
        if form == "alpaca" and name in ("input", "history"):
            continue
        target[name] = random_value(rng)
        chat = read(row, template)
        if isinstance(chat, BadRow):
            assert f"found {name}" in chat.reason and name in REFUSED | QUESTION_PARTS, row
        else:
            assert chat.turns == plain.turns
            listed = name if level == "row" else f"{name} of a {level}"
            assert listed in chat.unread, (row, chat.unread)


@pytest.mark.parametrize(("level", "form"), PLACES)
@pytest.mark.parametrize("empty", [None, "", [], {}, "[]", {"url": None}, [None]])
def test_a_field_that_is_empty_counts_as_missing(template, level, form, empty):
    row = row_of(form)
    names = {*REFUSED, *UNREAD_NAMES, *QUESTION_PARTS} - {"input", "history", "prefix"}
    for target in places_of(row, level):
        target |= dict.fromkeys(names, empty)
    chat = read(row, template)
    assert isinstance(chat, Chat) and chat.turns == read(row_of(form), template).turns
    assert not chat.unread


@pytest.mark.parametrize(("level", "form"), PLACES)
def test_a_refused_field_is_refused_at_every_level_that_a_format_has(template, level, form):
    for name in REFUSED:
        row = row_of(form)
        places_of(row, level)[-1][name] = True if name == "label" else ["x"]
        bad = read(row, template)
        assert isinstance(bad, BadRow) and f"found {name}" in bad.reason, row
        assert (bad.kind == "TokenizerException") == (REFUSED[name] == REFUSED["tools"])


def test_a_class_is_no_judgement_of_an_answer(template):
    for label in (True, False, "true", "False"):
        assert "preference data" in read(row_of("text") | {"label": label}, template).reason
    for label in ("sports", 0, 1, 3):
        assert read(row_of("text") | {"label": label}, template).unread == ["label"]


@pytest.mark.parametrize(("level", "form"), PLACES)
@pytest.mark.parametrize("label", [0, 1, "bad", "good", True])
def test_a_label_beside_an_answer_may_judge_it(template, level, form, label):
    if form == "text":
        return
    row = row_of(form)
    places_of(row, level)[-1]["label"] = label
    assert "preference data" in read(row, template).reason


@pytest.mark.parametrize(("level", "form"), PLACES)
def test_other_spellings_of_a_refused_field_are_refused_too(template, level, form):
    for spelled in ("Tools", "toolCalls", "IMAGE-URL", "Image Path", "pixelValues", "Chosen"):
        row = row_of(form)
        places_of(row, level)[-1][spelled] = ["x"]
        assert f"found {spelled}" in read(row, template).reason


def test_what_may_belong_to_a_question_is_refused_where_the_question_is_a_field(template):
    for form in ("alpaca", "prompt_completion", "prompts"):
        bad = read(row_of(form) | {"context": "c"}, template)
        assert "may belong to the question" in bad.reason and "context:ignore" in bad.reason
    for form in ("messages", "text"):
        assert read(row_of(form) | {"context": "c"}, template).unread == ["context"]
    # An instruction has these two itself.
    history = {"input": "this", "history": [["q", "a"]]}
    assert not read(row_of("alpaca") | history, template).unread
    assert "found input" in read(row_of("prompt_completion") | {"input": "this"}, template).reason


def test_fields_of_another_format_are_listed(template):
    row = row_of("messages") | row_of("alpaca") | {"text": "all of it", "system": "s"}
    assert read(row, template).unread == ["instruction", "output", "text"]
    assert read(row, template, format="text").unread == [
        *("messages", "instruction", "output"),
        "system",
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_only_last_and_split_group_are_honoured_in_every_format(template, form):
    row = row_of(form)
    if form == "alpaca":
        row["history"] = [["before", "then"]]
    for group in ("7", 7):
        assert read(row | {"split_group": group}, template).key == "7"
    assert "split_group" in read(row | {"split_group": [7]}, template).reason
    assert "only_last" in read(row | {"only_last": "False"}, template).reason
    last = read(row | {"only_last": True}, template)
    if form == "text":
        assert "only_last" in last.reason
    else:
        assert [turn.is_supervised for turn in last.turns][-1] and sum(
            turn.is_supervised for turn in last.turns
        ) == 1


@pytest.mark.parametrize(
    ("fields", "row", "messages", "unread"),
    [
        (
            "question:user,answer:assistant",
            {"question": "q", "answer": "a", "id": 3},
            [("user", "q"), ("assistant", "a")],
            ["id"],
        ),
        (
            "instruction:user,context:user,response:assistant,category:ignore",
            {"instruction": "q", "context": "c", "response": "a", "category": "open"},
            [("user", "q"), ("user", "c"), ("assistant", "a")],
            ["category"],
        ),
        (
            "instruction:user,context:user,response:assistant",
            {"instruction": "q", "context": None, "response": "a", "text": "t", "messages": [1]},
            [("user", "q"), ("assistant", "a")],
            ["messages", "text"],
        ),
        (
            "rules:system,q:user,a:assistant",
            {"a": "a", "q": "q", "rules": "s"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
            [],
        ),
        (
            "chosen:messages,rejected:ignore",
            {"chosen": row_of("messages")["messages"], "rejected": [1], "messages": None},
            [("user", "q"), ("assistant", "a")],
            ["rejected"],
        ),
        (
            "context:ignore,tools:ignore",
            {"instruction": "q", "output": "a", "context": "c", "tools": [1]},
            [("user", "q"), ("assistant", "a")],
            ["context", "tools"],
        ),
    ],
)
def test_a_field_means_what_the_user_says(template, fields, row, messages, unread):
    chat = read(row, template, fields=parse_fields(fields, "auto"))
    assert isinstance(chat, Chat), chat
    assert [(message.role, message.content) for message in chat.messages] == messages
    assert chat.unread == unread


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q"}, "no field that data.chat.fields names as assistant is filled (it has"),
        ({"answer": "a", "prompt": "q"}, "as user is filled (it has answer, prompt)"),
        ({"question": "q", "answer": 3}, "must be text (messages[1], found a number)"),
        ({"question": "q", "answer": "a", "context": "c"}, "found context"),
        ({"question": "q", "answer": "a", "images": ["i"]}, "found images"),
    ],
)
def test_a_row_that_does_not_fit_the_named_fields_is_bad(template, row, words):
    fields = parse_fields("question:user,answer:assistant", "auto")
    assert words in read(row, template, fields=fields).reason


@pytest.mark.parametrize(
    ("fields", "format", "words"),
    [
        ("question", "auto", "'question' must be NAME:MEANING"),
        (":user", "auto", "must be NAME:MEANING"),
        ("question:human", "auto", "one of system, user, assistant, messages, ignore"),
        ("q:user,q:assistant", "auto", "names q twice"),
        ("q:user,m:messages", "auto", "cannot stand beside another"),
        ("q:user,a:assistant", "alpaca", "format must be auto or messages, not alpaca"),
    ],
)
def test_a_wrong_value_of_fields_is_a_config_error(fields, format, words):
    with pytest.raises(ConfigError, match=f"^data.chat.fields.*{words}"):
        ChatConfig(fields=fields, format=format)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_every_kind_of_file_names_its_further_columns_and_counts_their_rows(
    template, tmp_path, suffix
):
    further = [
        {"id": 1, "meta": {"a": 1}, "tags": ["x"], "source": "s", "image": None},
        {"id": 2, "meta": None, "tags": [], "source": None, "image": None},
        {"id": 3, "meta": {"a": 2}, "tags": ["y", "z"], "source": None, "image": "i.png"},
    ]
    rows = [row_of("messages") | more for more in further]
    file = tmp_path / f"f{suffix}"
    write_table(file, rows)
    first, second, third = read_chats(str(file), template)
    assert set(first.unread) == {"id", "meta", "tags", "source"}
    # What a column of lists holds is not looked at.
    assert set(second.unread) - {"tags"} == {"id"}
    assert "found image" in third.reason


def test_fields_are_described_with_their_rows_the_most_frequent_first():
    unread = {"b": 2, "a": 2, "id": 10_000, "c": 1}
    assert describe_unread(unread) == "id (10,000 rows), a (2), b (2), c (1)"
    assert describe_unread(unread, 2) == "id (10,000 rows), a (2), and 2 more"
    assert describe_unread({"id": 1}) == "id (1 row)"
    assert describe_unread({"": 3, "\udce9t": 2}) == "'' (3 rows), \\udce9t (2)"


def test_the_page_on_conversations_names_every_field_that_has_a_meaning():
    page = (Path(__file__).parents[2] / "docs" / "chat_data.md").read_text()

    def is_named(name):
        parts = name.rpartition("_")[::2]  # The page names two parts for many fields.
        return f"`{name}`" in page or all(f"`{part}`" in page for part in parts)

    assert not [name for name in (*REFUSED, *QUESTION_PARTS, *MARKS) if not is_named(name)]
