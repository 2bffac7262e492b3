"""Chat templates: ids and mask. tests/parity compares the ids with those of mistral-common."""

import random

import numpy as np
import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.data.chat.errors import (
    ChatException,
    InvalidAssistantMessageException,
    LiteralInstException,
)
from mixtral_jax.data.chat.messages import read_messages
from mixtral_jax.data.chat.template import ChatTemplate
from tests.data.chat_cases import GOLDEN, mode_of, random_conversation, train_tokenizer

BOS, EOS = 1, 2
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def v1():
    return train_tokenizer()


@pytest.fixture(scope="module")
def v3():
    return train_tokenizer(control_symbols=["[INST]", "[/INST]"])


@pytest.fixture(scope="module")
def templates(v1, v3):
    return {
        "v1": ChatTemplate(v1, literal_inst="keep"),
        "v3": ChatTemplate(v3, literal_inst="keep"),
    }


def said(role, content, **fields):
    return {"role": role, "content": content, **fields}


def test_v1_writes_its_instructions_as_text(v1):
    messages = [
        said("system", "s"),
        said("user", "q"),
        said("assistant", "a"),
        said("user", "r"),
        said("assistant", "b"),
    ]
    chat = ChatTemplate(v1, "v1").encode(messages)
    asked, answer = v1.encode("[INST] s\n\nq [/INST]"), [*v1.encode("a"), EOS]
    again, final = v1.encode("[INST] r [/INST]"), [*v1.encode("b"), EOS]
    assert chat.tokens.tolist() == [BOS, *asked, *answer, *again, *final]
    lengths = [1 + len(asked), len(answer), len(again), len(final)]
    np.testing.assert_array_equal(chat.loss_mask, np.repeat([0, 1, 0, 1], lengths))


def test_v3_has_control_tokens_and_the_system_text_in_the_last_question(v3):
    messages = [said("system", "s"), said("user", "q"), said("assistant", "a  "), said("user", "r")]
    chat = ChatTemplate(v3, "v3").encode(messages, mode="serving")
    begin, end = v3.control_id("[INST]"), v3.control_id("[/INST]")
    asked, again = [begin, *v3.encode("q"), end], [begin, *v3.encode("s\n\nr"), end]
    assert chat.tokens.tolist() == [BOS, *asked, *v3.encode("a"), EOS, *again]
    assert v3.encode("[INST]").count(begin) == 0


def test_the_template_follows_from_the_tokenizer(v1, v3):
    assert (ChatTemplate(v1).version, ChatTemplate(v3).version) == ("v1", "v3")
    assert ChatTemplate(v3, "v1").version == "v1"
    with pytest.raises(ConfigError, match=r"v3 needs .*\[INST\].*use template v1"):
        ChatTemplate(v1, "v3")


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_conversations_have_their_structure_or_their_error(templates, version, case):
    if expected := case.get(f"error_{version}"):
        with pytest.raises(ChatException) as error:
            templates[version].encode(case["messages"], mode=mode_of(case))
        assert error.value.describe().startswith(expected)
        return
    chat = templates[version].encode(case["messages"], mode=mode_of(case))
    golden = case[f"tokens_{version}"]
    assert [chat.tokens.tolist().count(token) for token in (BOS, EOS)] == [
        golden.count(token) for token in (BOS, EOS)
    ]
    if version == "v1" and (mask := case.get("loss_mask_v1")):
        assert count_runs(chat.loss_mask) == count_runs(np.array(mask))


def count_runs(mask):
    return int(mask[0]) + int((np.diff(mask) > 0).sum())


@pytest.mark.parametrize("mode", ["training", "serving"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_any_text_gives_one_bos_an_eos_an_answer_and_a_mask_of_the_answers(
    request, templates, version, mode
):
    rng, template, tokenizer = (
        random.Random(f"{version} {mode}"),
        templates[version],
        request.getfixturevalue(version),
    )
    for _ in range(150):
        messages = random_conversation(rng, mode=mode)
        chat = template.encode(messages, mode=mode)
        answers = list(merged_answers(messages))
        tokens = chat.tokens.tolist()
        assert tokens[0] == BOS and tokens.count(BOS) == 1 and tokens.count(EOS) == len(answers)
        assert chat.tokens.dtype == chat.loss_mask.dtype == np.int32 and len(tokens) == len(
            chat.loss_mask
        )
        expected = []
        for text, weight in answers:
            ids = tokenizer.encode(text if version == "v1" else text.rstrip(" "))
            expected += [*ids, EOS] * (weight != 0)
        assert chat.tokens[chat.loss_mask == 1].tolist() == expected


def merged_answers(messages):
    """Text and weight of each answer, neighbours of one weight joined."""
    previous = None
    answers = []
    for message in messages:
        key = (message["role"], message.get("weight"))
        if message["role"] == "assistant" and key == previous:
            answers[-1] = (answers[-1][0] + "\n\n" + message["content"], answers[-1][1])
        elif message["role"] == "assistant":
            answers.append((message["content"], message.get("weight")))
        previous = key
    return answers


def test_many_conversations_at_once_are_each_by_itself(templates):
    rng = random.Random(1)
    conversations = [random_conversation(rng, mode="training") for _ in range(20)]
    template = templates["v1"]
    together = template.encode_turns(
        [template.lay_out(read_messages(messages)) for messages in conversations]
    )
    for chat, messages in zip(together, conversations, strict=True):
        alone = template.encode(messages)
        np.testing.assert_array_equal(chat.tokens, alone.tokens)
        np.testing.assert_array_equal(chat.loss_mask, alone.loss_mask)


def test_a_weight_of_zero_keeps_an_answer_out_of_the_loss_and_apart(v1):
    template = ChatTemplate(v1)
    first, second = said("assistant", "one", weight=0), said("assistant", "two", weight=1)
    chat = template.encode([USER, first, second])
    assert chat.tokens[chat.loss_mask == 1].tolist() == [*v1.encode("two"), EOS]
    assert chat.tokens.tolist().count(EOS) == 2


def test_text_chunks_and_text_fields_are_contents(v1):
    template = ChatTemplate(v1)
    chunks = [
        {"type": "text", "text": "one"},
        {"type": "text", "text": ""},
        {"type": "text", "text": "two"},
    ]
    written = [said("user", "one\n\ntwo"), ANSWER]
    for first in (
        said("user", chunks),
        {"role": "user", "text": "one\n\ntwo", "content": None, "weight": None},
    ):
        assert (
            template.encode([first, ANSWER]).tokens.tolist()
            == template.encode(written).tokens.tolist()
        )


def test_a_literal_inst_is_rejected_kept_or_stripped_in_v1_and_harmless_in_v3(v1, v3):
    messages = [said("user", "a [IN[INST]ST] b [/INST]"), ANSWER]
    with pytest.raises(LiteralInstException, match=r"\[INST\].*keep or strip \(messages\[0\]\)"):
        ChatTemplate(v1).encode(messages)
    kept = ChatTemplate(v1, literal_inst="keep").encode(messages)
    asked = v1.encode("[INST] a [IN[INST]ST] b [/INST] [/INST]")
    assert kept.tokens.tolist() == [BOS, *asked, *v1.encode("a"), EOS]
    stripped = ChatTemplate(v1, literal_inst="strip").encode(messages)
    assert (
        stripped.tokens.tolist()
        == ChatTemplate(v1).encode([said("user", "a  b "), ANSWER]).tokens.tolist()
    )
    assert ChatTemplate(v3).encode(messages).tokens.tolist().count(v3.control_id("[INST]")) == 1
    with pytest.raises(InvalidAssistantMessageException):
        ChatTemplate(v1, literal_inst="strip").encode([USER, said("assistant", "[INST]")])
