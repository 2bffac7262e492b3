"""Conversations that no template accepts: each mistake has a name, a rule and a place."""

import pytest

from mixtral_jax.data.chat.errors import (
    InvalidAssistantMessageException,
    InvalidMessageStructureException,
    InvalidSystemPromptException,
    InvalidTextException,
    InvalidUserMessageException,
    TokenizerException,
)
from mixtral_jax.data.chat.template import ChatTemplate
from tests.data.chat_cases import train_tokenizer

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(train_tokenizer(), literal_inst="keep")


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


@pytest.mark.parametrize(
    ("messages", "mode", "kind", "words"),
    [
        ("text", "training", InvalidMessageStructureException, "must be a list"),
        ([], "training", InvalidMessageStructureException, "at least one message"),
        (
            ["text"],
            "training",
            InvalidMessageStructureException,
            r"an object .*\(messages\[0\], found text\)",
        ),
        ([{"content": "a"}], "training", InvalidMessageStructureException, "no role"),
        (
            [message(["user"], "a")],
            "training",
            InvalidMessageStructureException,
            "one of system, user, assistant",
        ),
        (
            [USER, message("model", "a")],
            "training",
            InvalidMessageStructureException,
            r"\(messages\[1\], role='model'\)",
        ),
        ([message("user", None), ANSWER], "training", InvalidUserMessageException, "it is missing"),
        ([message("user", 3), ANSWER], "training", InvalidUserMessageException, "a number"),
        (
            [message("user", [{"type": "image_url"}]), ANSWER],
            "training",
            InvalidUserMessageException,
            "image_url",
        ),
        (
            [message("user", "a", text="b"), ANSWER],
            "training",
            InvalidUserMessageException,
            "content and text, not both",
        ),
        (
            [message("user", None, value="a", text="b"), ANSWER],
            "training",
            InvalidUserMessageException,
            "text and value, not both",
        ),
        (
            [USER, message("assistant", "a", **{"from": "human"})],
            "training",
            InvalidMessageStructureException,
            r"must agree: .*\[1\], role='assistant', from='human'",
        ),
        (
            [message("user", "a", context="c"), ANSWER],
            "training",
            InvalidUserMessageException,
            "may belong to the question, .*found context",
        ),
        (
            [message("user", "a", weight=1), ANSWER],
            "training",
            InvalidUserMessageException,
            "only assistant",
        ),
        (
            [message("system", None), USER, ANSWER],
            "training",
            InvalidSystemPromptException,
            "must be text",
        ),
        (
            [message("user", "\ud800"), ANSWER],
            "training",
            InvalidTextException,
            "UTF-8 at character 0",
        ),
        ([USER], "training", InvalidMessageStructureException, "last role Assistant"),
        ([ANSWER], "training", InvalidMessageStructureException, "start with a user"),
        (
            [USER, ANSWER, message("system", "s"), USER, ANSWER],
            "training",
            InvalidMessageStructureException,
            r"\[2\]",
        ),
        (
            [USER, message("assistant", None)],
            "training",
            InvalidAssistantMessageException,
            "it is empty",
        ),
        (
            [USER, message("assistant", "a", weight=0.5)],
            "training",
            InvalidAssistantMessageException,
            "weight=0.5",
        ),
        (
            [USER, message("assistant", "a", prefix=True)],
            "training",
            InvalidMessageStructureException,
            "continue final",
        ),
        (
            [USER, message("assistant", "a", prefix="no")],
            "serving",
            InvalidAssistantMessageException,
            "true or false",
        ),
        (
            [USER, message("assistant", "a", prefix=True), USER],
            "serving",
            InvalidAssistantMessageException,
            "be last",
        ),
        ([USER, ANSWER], "serving", InvalidMessageStructureException, "last role User"),
        (
            [USER, message("assistant", None, tool_calls=[{}])],
            "training",
            TokenizerException,
            "tool_calls",
        ),
        (
            [USER, message("tool", "a"), ANSWER],
            "training",
            TokenizerException,
            r"\[1\], role='tool'",
        ),
    ],
)
def test_a_mistake_has_a_name_a_rule_and_a_place(template, messages, mode, kind, words):
    with pytest.raises(kind, match=words):
        template.encode(messages, mode=mode)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ("a", r"an object with type and text \(messages\[0\], content\[1\] is text\)"),
        (None, r"an object with type and text .*content\[1\] is null"),
        ({"value": "a"}, r"an object with type and text .*content\[1\] has value"),
        ({"text": "a"}, r"an object with type and text .*content\[1\] has text"),
        ({"type": "image_url", "image_url": {"url": "u"}}, r"content\[1\], type='image_url'"),
        ({"type": "text", "value": "a"}, r"its text in the field text .*\[1\] has type, value"),
        ({"type": "text", "text": None}, r"its text in the field text .*\[1\] has type, text"),
        ({"type": "text", "text": 3}, r"its text in the field text .*\[1\] has a number as text"),
        ({"type": "text", "text": "a", "image_url": {"url": "u"}}, "only text is read"),
    ],
)
def test_what_is_wrong_with_a_chunk_is_said_of_that_chunk(template, chunk, words):
    content = [{"type": "text", "text": "a"}, chunk]
    with pytest.raises(InvalidUserMessageException, match=words):
        template.encode([message("user", content), ANSWER])
