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
            "not both",
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
