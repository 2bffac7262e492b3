"""Marks of what is learnt, in the words of many tools: of messages, chunks, rows and documents."""

import pytest

from mixtral_jax.data.chat.conversations import Chat, read_chat, read_chats
from mixtral_jax.data.chat.errors import ChatException
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.documents import Document, read_documents
from mixtral_jax.data.field_names import fold_name
from mixtral_jax.data.marks import MARKS, TOKEN_MARKS, read_marks
from mixtral_jax.data.readers import BadRow, RawRow
from tests.data.chat_cases import row_of, train_tokenizer, write_table

ASK, FIRST, LAST = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)
# Values of a mark that say yes, no, and neither.
YES, NO = (True, 1, 1.0, "true", "1", "True"), (False, 0, 0.0, "FALSE", "0", "0.0")
NEITHER = (0.5, 2, -1, "no", "0.5", [1], {"on": True})


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(train_tokenizer())


def read(row, template):
    """The conversation, or the reason why the row is bad."""
    try:
        return read_chat(RawRow(row, "f.jsonl:7"), template)
    except ChatException as error:
        return error.describe()


def talk(template, *, ask=None, first=None, last=None):
    """What becomes of a conversation of two questions whose messages have further fields."""
    turns = [ASK | (ask or {}), FIRST | (first or {}), ASK, LAST | (last or {})]
    return read({"messages": turns}, template)


def learns(name):
    """The values of a mark by which a message is learnt, and by which it is not."""
    return (YES, NO) if MARKS[name] else (NO, YES)


# One of each form that the table of marks has; all of them are in it by their words.
ONE_OF_EACH = (
    *("weight", "loss_scale", "loss", "train", "trained", "supervised", "is_train", "should_train"),
    *("use_loss", "used_for_training", "include_in_loss", "train_on_turn", "masked", "no_grad"),
    *("skip", "ignored", "exclude", "do_not_train", "skip_training", "not_trainable"),
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_mark_of_an_answer_is_honoured_or_makes_the_row_bad_by_name(template, name):
    learnt, not_learnt = learns(name)
    for value in not_learnt:
        expected = talk(template, first={"weight": 0})
        assert talk(template, first={name: value}).turns == expected.turns
    for value in learnt:
        expected = talk(template)
        assert talk(template, first={name: value}).turns == expected.turns
    for value in NEITHER:
        assert f"{name}={value!r}" in talk(template, first={name: value})
    for value in (None, ""):
        assert talk(template, first={name: value}) == talk(template)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_mark_of_another_message_may_only_say_what_happens_anyway(template, name, role):
    learnt, not_learnt = learns(name)
    for value in not_learnt:
        assert talk(template, ask={"role": role, name: value}) == talk(template, ask={"role": role})
    for value in (*learnt, *NEITHER):
        reason = talk(template, ask={"role": role, name: value})
        assert f"only assistant messages can be learnt, not a {role} message" in reason
        assert f"{name}={value!r}" in reason


SPELLED = [
    *("Weight", "LOSS", "lossWeight", "loss-weight", "Loss Multiplier", "doNotTrain", "SkipLoss"),
    *("exclude-from-loss", "Learnable", "calculateLoss"),
]


def in_our_words(spelled):
    """The mark that a spelling means."""
    return next(name for name in MARKS if fold_name(name) == fold_name(spelled))


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_mark_means_the_same_however_it_is_spelled(template, tmp_path, spelled):
    learnt, not_learnt = (values[0] for values in learns(in_our_words(spelled)))
    left_out = talk(template, first={"weight": 0})
    assert talk(template, first={spelled: not_learnt}) == left_out
    assert talk(template, first={spelled: learnt}).turns == talk(template).turns
    assert not talk(template, first={spelled: learnt}).unread
    assert "must agree" in talk(template, first={spelled: not_learnt, "train": True})
    assert f"{spelled}=0.5" in talk(template, first={spelled: 0.5})
    assert f"{spelled}=" in read(row_of("text") | {spelled: not_learnt}, template)
    rows = [{"text": "t", spelled: value} for value in (learnt, not_learnt)]
    for suffix in (".jsonl", ".parquet", ".arrow"):
        write_table(tmp_path / f"f{suffix}", rows)
        good, bad = read_documents(str(tmp_path / f"f{suffix}"), "text")
        assert isinstance(good, Document) and bad.reason.startswith(f"{spelled}=")


@pytest.mark.parametrize("field", ["metadata", "meta", "Metadata"])
@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"doNotTrain": True}])
def test_a_mark_in_the_metadata_is_not_passed_over(template, tmp_path, field, mark):
    ((name, value),) = mark.items()
    named = f"{field}.{name}={value!r}"
    assert named in talk(template, first={field: mark})
    assert named in read(row_of("messages") | {field: mark}, template)
    assert talk(template, ask={field: mark}).turns == talk(template).turns
    for suffix in (".jsonl", ".parquet"):
        write_table(tmp_path / f"f{suffix}", [{"text": "t", field: mark}])
        (bad,) = read_documents(str(tmp_path / f"f{suffix}"), "text")
        assert bad.reason.startswith(f"{named} ")
    # It may be about something else.
    other = {field: {"weight": 72, "train": "ICE 1601", "loss": 2.3}}
    assert talk(template, first=other).turns == talk(template).turns


@pytest.mark.parametrize("name", sorted(MARKS.keys() - {"weight"}))
def test_marks_that_disagree_make_the_row_bad_by_name(template, name):
    learnt, not_learnt = learns(name)
    reason = talk(template, first={name: learnt[0], "weight": 0})
    assert "must agree" in reason and name in reason and "weight=0" in reason
    assert talk(template, first={name: not_learnt[0], "weight": 0}) == talk(
        template, first={"weight": 0}
    )


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_mark_of_a_chunk_must_say_what_its_message_says(template, name):
    learnt, not_learnt = learns(name)

    def chunk(value):
        return {
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "", name: value}]
        }

    plain = {"content": [{"type": "text", "text": "a"}]}
    assert talk(template, first=chunk(learnt[0])) == talk(template, first=plain)
    assert talk(template, ask=chunk(not_learnt[0])) == talk(template, ask=plain)
    marked = chunk(not_learnt[0]) | {"weight": 0}
    assert talk(template, first=marked) == talk(template, first=plain | {"weight": 0})
    for wrong in (
        talk(template, first=chunk(not_learnt[0])),
        talk(template, first=chunk(0.5)),
        talk(template, ask=chunk(learnt[0])),
        talk(template, first=chunk(learnt[0]) | {"weight": 0}),
    ):
        assert "content[1] has" in wrong and name in wrong


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("form", ["messages", "alpaca", "prompt_completion", "text"])
def test_a_row_that_is_marked_as_not_to_be_learnt_is_bad_by_name(template, name, form):
    learnt, not_learnt = learns(name)
    for value in learnt:
        assert read(row_of(form) | {name: value}, template) == read(row_of(form), template)
    for value in not_learnt:
        reason = read(row_of(form) | {name: value}, template)
        assert "marked as not to be learnt" in reason and f"{name}={value!r}" in reason
    for value in NEITHER:
        assert f"{name}={value!r}" in read(row_of(form) | {name: value}, template)


def test_marks_are_read_in_csv(template, tmp_path):
    rows = ["q,a,1,false", "q,a,TRUE,", "q,a,0,", "q,a,,True"]
    (tmp_path / "f.csv").write_text("\n".join(["prompt,completion,train,masked", *rows]))
    good, other, *bad = read_chats(str(tmp_path), template)
    assert isinstance(good, Chat) and isinstance(other, Chat)
    assert ["train='0'" in bad[0].reason, "masked='True'" in bad[1].reason] == [True, True]
    good, other, *bad = read_documents(str(tmp_path), "prompt")
    assert isinstance(good, Document) and isinstance(other, Document)
    assert [row.reason[:10] for row in bad] == ["train='0' ", "masked='Tr"]


def test_columns_that_hold_marks_are_loaded(template, tmp_path):
    rows = [row_of("messages") | {"train": train} for train in (True, False)]
    write_table(tmp_path / "f.parquet", rows)
    good, bad = read_chats(str(tmp_path), template)
    assert isinstance(good, Chat) and "train=False" in bad.reason


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "is_good"),
    [
        ({"text": "t", "id": 3, "url": "u", "label": True, "labels": ["news"]}, True),
        ({"text": "t", "attention_mask": [1, 0]}, True),
        ({"text": "t", "weight": 1, "train": True, "masked": False}, True),
        # Measured, as by a filter.
        ({"text": "t", "loss": 2.31}, True),
        ({"text": "t", "train": False}, False),
        ({"text": "t", "masked": True}, False),
        ({"text": "t", "loss": 0}, False),
        ({"text": "t", "weight": 0.5}, False),
        ({"text": "t", "sample_weight": 3}, False),
        ({"text": "t", "weight": "1", "train": "true", "loss": "cross entropy"}, True),
        ({"text": "t", "weight": "0.5"}, False),
        ({"text": "t", "train": "false"}, False),
        ({"text": "t", "masked": [1, 0]}, False),
        *(({"text": "t", name: [1, 0]}, False) for name in TOKEN_MARKS),
        *(({"text": [5, 6], name: [1.0, 0.5]}, False) for name in TOKEN_MARKS),
        ({"text": "t", "loss_mask": 0}, False),
        ({"text": "t", "loss_mask": 1, "mask": [1, 1], "masks": "a.png"}, True),
        ({"text": [5, 6], "loss_mask": [1, 1], "attention_mask": [1, 1], "labels": [5, 6]}, True),
        ({"text": [5, 6], "loss_mask": [0, 1]}, False),
        ({"text": [5, 6, 0], "attention_mask": [1, 1, 0]}, False),
        ({"text": [5, 6], "labels": [-100, 6]}, False),
    ],
)
def test_a_document_that_is_not_to_be_learnt_whole_is_bad_by_name(tmp_path, suffix, row, is_good):
    write_table(tmp_path / f"f{suffix}", [row])
    (found,) = read_documents(str(tmp_path), "text")
    assert isinstance(found, Document) == is_good
    if isinstance(found, BadRow):
        *_, name = row
        assert found.reason.startswith(f"{name}=") and found.kind == "not to be learnt"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_what_a_document_fills_and_nothing_reads_is_listed(tmp_path, suffix):
    read = {"text": "t", "kind": "prose", "train": True, "weight": 1, "loss_mask": [1]}
    others = {
        **{"id": 3, "images": ["i"], "tools": ["t"], "chosen": "c", "meta": {"a": 1}},
        **{"attention_mask": [1, 0], "labels": [7], "label": True, "loss": 2.31, "masks": "a.png"},
    }
    write_table(tmp_path / f"f{suffix}", [read | others | {"url": None, "title": ""}])
    (found,) = read_documents(str(tmp_path), "text", "kind")
    assert isinstance(found, Document)
    assert sorted({*found.unread} - ({"title"} if suffix != ".jsonl" else set())) == sorted(others)
    ids = {"text": [5, 6], "attention_mask": [1, 1], "labels": [5, 6], "id": 3}
    write_table(tmp_path / f"f{suffix}", [ids])
    (found,) = read_documents(str(tmp_path), "text")
    assert isinstance(found, Document) and found.unread == ("id",)


def test_the_text_itself_is_no_mark(tmp_path):
    write_table(tmp_path / "f.jsonl", [{"loss": "t", "labels": [5, 6]}])
    for field in ("loss", "labels"):
        (found,) = read_documents(str(tmp_path), field)
        assert isinstance(found, Document)


def test_marks_are_read_by_name():
    fields = {"loss": True, "masked": 1, "weight": 0.5, "train": None, "id": 1}
    assert read_marks(fields) == {"loss": True, "masked": False, "weight": None}
