"""Conversations as token stores: what is left out, what is held out, what is cached."""

import json
import logging

import numpy as np
import pytest

from mixtral_jax.config import ChatConfig, ConfigError, DataConfig
from mixtral_jax.data.chat.prepare import pick_questions, prepare_chats
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer
from tests.data.chat_cases import train_tokenizer, write_mixed_rows

EOS = 2
NUM_ROWS = 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def ask(number, answer=None, **more):
    answer = {"role": "assistant", "content": answer or f"answer {number}", **more}
    return {"messages": [{"role": "user", "content": f"question {number}"}, answer]}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare(path, tokenizer, tmp_path, **settings):
    config = DataConfig(**{"path": str(path), "held_out_fraction": 0.2, **settings})
    return prepare_chats(config, tokenizer)


def documents_of(store):
    return [store.read(number) for number in range(store.num_documents)]


def texts_of(store, tokenizer):
    return {tokenizer.decode(document.tokens.tolist()) for document in documents_of(store)}


def test_stores_hold_what_the_template_gives(tokenizer, tmp_path):
    rows = [ask(number) for number in range(NUM_ROWS)]
    prepared = prepare(write_rows(tmp_path / "f.jsonl", rows), tokenizer, tmp_path)
    expected = {}
    for row in rows:
        chat = ChatTemplate(tokenizer).encode(row["messages"])
        expected[tuple(chat.tokens)] = chat.loss_mask
    documents = documents_of(prepared.train) + documents_of(prepared.held_out)
    assert len(documents) == NUM_ROWS and prepared.num_bad == 0
    for document in documents:
        np.testing.assert_array_equal(document.loss_mask, expected.pop(tuple(document.tokens)))
    assert prepared.train.tokens.dtype == np.uint16 and prepared.train.loss_mask.dtype == np.uint8


def test_answers_to_one_question_are_on_one_side(tokenizer, tmp_path):
    rows = [ask(number, f"answer {other}") for number in range(NUM_ROWS) for other in range(3)]
    prepared = prepare(write_rows(tmp_path / "f.jsonl", rows), tokenizer, tmp_path)
    sides = [
        {text.partition("[/INST]")[0] for text in texts_of(store, tokenizer)}
        for store in (prepared.train, prepared.held_out)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert prepared.train.num_documents == 3 * len(sides[0])


def test_conversations_that_all_ask_the_same_are_a_config_error(tokenizer, tmp_path):
    rows = [ask(1, f"answer {number}") for number in range(5)]
    with pytest.raises(ConfigError, match="all conversations ask the same"):
        prepare(write_rows(tmp_path / "f.jsonl", rows), tokenizer, tmp_path)


def test_rows_without_a_token_to_learn_are_left_out_named_and_counted(tokenizer, tmp_path, caplog):
    rows = [ask(number, weight=number % 2) for number in range(NUM_ROWS)]
    prepared = prepare(
        write_rows(tmp_path / "f.jsonl", rows), tokenizer, tmp_path, max_bad_fraction=0.5
    )
    assert prepared.num_bad == NUM_ROWS // 2
    assert prepared.train.num_documents + prepared.held_out.num_documents == NUM_ROWS // 2
    assert (
        "f.jsonl:1: NoSupervisedTokenException: a conversation must have an answer to train on"
        in caplog.text
    )


def test_training_drops_exactly_the_bad_rows_or_stops(tokenizer, tmp_path):
    wrong = write_mixed_rows(tmp_path / "f.jsonl", num_rows=1000, num_bad=20)
    prepared = prepare(tmp_path / "f.jsonl", tokenizer, tmp_path, max_bad_fraction=0.02)
    assert prepared.num_bad == len(wrong) == 20
    texts = " ".join(texts_of(prepared.train, tokenizer) | texts_of(prepared.held_out, tokenizer))
    for line in range(1, 1001):
        assert (f"What is {line} + {line}?" in texts) == (line not in wrong)
    first = min(wrong)
    with pytest.raises(
        ConfigError, match=rf"20 of 1000 rows are bad \(2.0%\), .*first: .*f.jsonl:{first}: "
    ) as error:
        prepare(tmp_path / "f.jsonl", tokenizer, tmp_path, max_bad_fraction=0.019)
    assert wrong[first] in str(error.value)


def test_several_sources_lie_one_after_the_other(tokenizer, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [ask(number) for number in range(NUM_ROWS)])
    two = write_rows(tmp_path / "two.jsonl", [ask(-number - 1) for number in range(NUM_ROWS)])
    prepared = prepare(f"{one}:3,{two}", tokenizer, tmp_path)
    for store in (prepared.train, prepared.held_out):
        first, second = store.documents_by_source
        texts = [tokenizer.decode(document.tokens.tolist()) for document in documents_of(store)]
        assert all(("question -" in text) == (place >= first) for place, text in enumerate(texts))
        assert first and second and first + second == store.num_documents


def test_conversations_are_tokenized_once_and_again_when_a_setting_changes(
    tokenizer, tmp_path, cache_dir, monkeypatch
):
    file = write_rows(tmp_path / "f.jsonl", [ask(number) for number in range(NUM_ROWS)])
    first = prepare(file, tokenizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_all", lambda self, texts: pytest.fail("tokenized again"))
        for chat in (ChatConfig(long_rows="drop"), ChatConfig()):
            assert (
                prepare(file, tokenizer, tmp_path, chat=chat).train.fingerprint
                == first.train.fingerprint
            )
    for chat in (ChatConfig(literal_inst="keep"), ChatConfig(format="messages")):
        prepare(file, tokenizer, tmp_path, chat=chat)
    prepare(file, train_tokenizer(control_symbols=["[INST]", "[/INST]"]), tmp_path)
    assert len(list(cache_dir.iterdir())) == 4


@pytest.mark.parametrize("name", ["loss_mask", "tokens"])
def test_a_damaged_mask_is_written_again_with_a_warning(
    tokenizer, tmp_path, cache_dir, caplog, name
):
    rows = write_rows(tmp_path / "f.jsonl", [ask(number) for number in range(NUM_ROWS)])
    before = prepare(rows, tokenizer, tmp_path)
    mask = np.array(before.train.loss_mask)
    (file,) = cache_dir.glob(f"*/train/{name}")
    file.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(prepare(rows, tokenizer, tmp_path).train.loss_mask, mask)
    assert "is damaged" in caplog.text


def test_questions_are_held_out_conversations_up_to_their_first_answer(tokenizer, tmp_path):
    rows = [
        {"messages": ask(number)["messages"] + ask(number, "more")["messages"]}
        for number in range(NUM_ROWS)
    ]
    prepared = prepare(write_rows(tmp_path / "f.jsonl", rows), tokenizer, tmp_path)
    questions = pick_questions(prepared.held_out, 3)
    assert (
        len(questions) == 3
        and len(pick_questions(prepared.held_out, 1000)) == prepared.held_out.num_documents
    )
    for question in questions:
        number = int(tokenizer.decode(question.answer.tolist()).removeprefix("answer "))
        messages = ask(number)["messages"]
        assert (
            question.prompt.tolist()
            == ChatTemplate(tokenizer).encode(messages[:1], mode="serving").tokens.tolist()
        )
        assert question.answer.tolist() == [*tokenizer.encode(f"answer {number}"), EOS]


def test_fields_that_are_not_read_are_counted_and_kept_with_the_cache(tokenizer, tmp_path):
    rows = [ask(number, name="n") | {"id": number} for number in range(NUM_ROWS)]
    rows[0] |= {"source": "s"}
    rows[1] |= {"id": None, "images": ["i.png"]}  # A bad row is named instead.
    file = write_rows(tmp_path / "f.jsonl", rows)
    expected = {"id": NUM_ROWS - 1, "name of a message": NUM_ROWS - 1, "source": 1}
    for _ in range(2):
        prepared = prepare(file, tokenizer, tmp_path, max_bad_fraction=0.1)
        assert prepared.unread == expected and prepared.num_bad == 1


def test_named_fields_are_conversations_of_their_own_in_the_cache(tokenizer, tmp_path):
    rows = [{"q": f"q {number}", "a": "a", "b": "b"} for number in range(NUM_ROWS)]
    file = write_rows(tmp_path / "f.jsonl", rows)
    for answer, other in ("ab", "ba"):
        chat = ChatConfig(fields=f"q:user,{answer}:assistant")
        prepared = prepare(file, tokenizer, tmp_path, chat=chat)
        assert all(text.endswith(answer) for text in texts_of(prepared.train, tokenizer))
        assert prepared.unread == {other: NUM_ROWS}
