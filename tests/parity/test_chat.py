"""Conversations give the same ids, masks and errors as in mistral-common.

Only `make test-parity` runs these tests: they need mistral-common.
"""

import functools
import json
import random

import pytest

from mixtral_jax.cli.main import run_verb
from mixtral_jax.data.chat.errors import ChatException
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.tokenizer import read_tokenizer
from tests.data.chat_cases import GOLDEN, mode_of, random_conversation, random_text

pytest.importorskip(
    "mistral_common", reason="parity needs mistral-common: make test-parity installs it"
)

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import (
    FinetuningAssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TOKENIZERS = {"v1": "mixtral", "v3": "mixtral-v3"}
MODES = {"training": ValidationMode.finetuning, "serving": ValidationMode.test}
MESSAGES = {"user": UserMessage, "system": SystemMessage, "assistant": FinetuningAssistantMessage}


@pytest.fixture(scope="module", params=["v1", "v3"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def template(version):
    return ChatTemplate(read_tokenizer(TOKENIZERS[version]), literal_inst="keep")


@functools.cache
def their_tokenizer(version):
    return getattr(MistralTokenizer, version)()


def encode_theirs(version, mode, messages):
    """mistral-common's ids, or its error as `Kind: message`."""
    tokenizer = their_tokenizer(version)
    normalizer = InstructRequestNormalizer(
        UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, InstructRequest, None
    )
    tokenizer._chat_completion_request_validator._mode = MODES[mode]
    try:
        request = ChatCompletionRequest(
            messages=[MESSAGES[message["role"]](**message) for message in messages]
        )
        tokenizer._chat_completion_request_validator.validate_request(request)
        return tokenizer.instruct_tokenizer.encode_instruct(
            normalizer.from_chat_completion_request(request)
        ).tokens
    except MistralCommonException as error:
        return f"{type(error).__name__}: {error.message}"


@pytest.mark.parametrize("mode", ["training", "serving"])
def test_inspect_gives_each_golden_conversation_its_ids_mask_or_error(
    capsys, tmp_path, version, mode
):
    cases = [case for case in GOLDEN if mode_of(case) == mode]
    (tmp_path / "f.jsonl").write_text(
        "".join(json.dumps({"messages": case["messages"]}) + "\n" for case in cases)
    )
    flags = [
        f"--tokenizer={TOKENIZERS[version]}",
        f"--template={version}",
        f"--mode={mode}",
        "--literal_inst=keep",
    ]
    assert run_verb(["data", "inspect", str(tmp_path / "f.jsonl"), *flags, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for index, (line, case) in enumerate(zip(lines, cases, strict=True)):
        assert line["index"] == index
        if expected := case.get(f"error_{version}"):
            assert line["error"].startswith(expected)
        else:
            assert line["tokens"] == case[f"tokens_{version}"]
            assert line["loss_mask"] == case.get(f"loss_mask_{version}", line["loss_mask"])


@pytest.mark.parametrize("mode", ["training", "serving"])
def test_any_text_in_any_message_gives_their_ids(template, version, mode):
    rng = random.Random(f"{version} {mode}")
    for _ in range(300):
        messages = random_conversation(rng, mode=mode)
        assert template.encode(messages, mode=mode).tokens.tolist() == encode_theirs(
            version, mode, messages
        ), messages


@pytest.mark.parametrize("mode", ["training", "serving"])
def test_any_messages_give_their_ids_or_their_mistake(template, version, mode):
    rng = random.Random(f"{version} {mode}")
    for _ in range(300):
        messages = []
        for _ in range(rng.randint(0, 5)):
            message = {
                "role": rng.choice([*MESSAGES]),
                "content": rng.choice(["", random_text(rng)]),
            }
            if message["role"] == "assistant":
                message |= {"weight": rng.choice([None, 0, 1, 0.5]), "prefix": rng.random() < 0.1}
            messages.append(message)
        expected = encode_theirs(version, mode, messages)
        try:
            assert template.encode(messages, mode=mode).tokens.tolist() == expected, messages
        except ChatException as mistake:
            assert isinstance(expected, str) and mistake.describe().startswith(expected), messages
