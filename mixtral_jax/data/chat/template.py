"""The chat templates of Mixtral Instruct: from conversations to token ids and a loss mask.

Each message is tokenized by itself and never as part of a rendered string, so `</s>` in a text
stays text and there is only one BOS. `v1` (8x7B Instruct) writes `[INST]` and `[/INST]` as text;
`v3` (8x22B Instruct) has control tokens for them. The rules are those of mistral-common's
InstructTokenizerV1 and V3 for conversations without tools. `conversations` reads the
conversations; `packing` fills rows with them.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mixtral_jax.config import LiteralInst, TemplateName, require
from mixtral_jax.data.chat.errors import LiteralInstException
from mixtral_jax.data.chat.messages import (
    TEXT_SEPARATOR,
    Message,
    Mode,
    check_structure,
    read_messages,
)
from mixtral_jax.data.tokenized import Tokenized
from mixtral_jax.data.tokenizer import Tokenizer

# The system prompt that `safe_prompt` of Mistral's API adds (Mistral's page on guardrailing).
SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid "
    "harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and "
    "positivity."
)
_BEGIN, _END = "[INST]", "[/INST]"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message as laid out by a template: a text with control ids before and after it.

    `is_supervised`: whether all of these tokens are trained on, or none.
    """

    text: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    is_supervised: bool = False


class ChatTemplate:
    """A chat template of Mixtral Instruct for one tokenizer.

    Args:
        tokenizer: None if conversations are only to be checked and laid out, not encoded; `auto` is
            then `v1`.
        version: `auto` is `v3` if the tokenizer has its control tokens, else `v1`.
        literal_inst: what `v1` does with a text that contains `[INST]` or `[/INST]`, whose ids
            equal those of the template's own: `reject` the conversation, `keep` the text, or
            `strip` them from the text. `v3` keeps every text.

    Attributes:
        version: `v1` or `v3`.

    Raises:
        ConfigError: the tokenizer lacks the control tokens of `v3`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        version: TemplateName = "auto",
        *,
        literal_inst: LiteralInst = "reject",
    ):
        ids = [tokenizer.control_id(piece) for piece in (_BEGIN, _END)] if tokenizer else []
        controls = [control for control in ids if control is not None]
        has_controls = len(controls) == 2
        require(
            version != "v3" or has_controls or tokenizer is None,
            f"template v3 needs a tokenizer with control tokens {_BEGIN} and {_END}, such as "
            "mixtral-v3: use that tokenizer or template v1",
        )
        is_v3 = version == "v3" or (version == "auto" and has_controls)
        self.version: Literal["v1", "v3"] = "v3" if is_v3 else "v1"
        self._literal_inst = literal_inst if self.version == "v1" else "keep"
        self._begin, self._end = tuple(controls[:1]), tuple(controls[1:])
        self._eos = (tokenizer.eos_id,) if tokenizer else ()
        self._tokenizer = tokenizer

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, mode: Mode = "training"
    ) -> Tokenized:
        """Tokenizes a conversation, such as `[{"role": "user", "content": "Hi"}, ...]`.

        Args:
            mode: in `training`, the last message must be an answer. In `serving`, it must be a
                message to answer, or an answer with `prefix` true to continue.

        Returns:
            int32 ids with BOS at the start and nowhere else, and the mask: 1 on the tokens of
            answers and on the EOS after each.

        Raises:
            ChatException: says what is wrong with the conversation, and in which message.
        """
        return self.encode_turns([self.lay_out(read_messages(messages), mode=mode)])[0]

    def lay_out(self, messages: Sequence[Message], *, mode: Mode = "training") -> list[Turn]:
        """Checks a conversation and lays it out as turns.

        Neighbouring messages of the same role are merged. System texts are put into the first user
        message (`v1`) or the last (`v3`). A conversation that begins with an answer gets an empty
        question before it.

        Raises:
            ChatException: says what is wrong with the conversation, and in which message.
        """
        if self._literal_inst == "strip":
            messages = [
                dataclasses.replace(message, content=_strip(message.content))
                for message in messages
            ]
        check_structure(messages, mode)
        if self._literal_inst == "reject":
            _reject_literals(messages)
        merged = list(_merge(messages))
        if not merged or merged[0].role != "user":
            merged.insert(0, Message("user", ""))
        users = [index for index, message in enumerate(merged) if message.role == "user"]
        systems = [
            message.content for message in messages if message.role == "system" and message.content
        ]
        if systems:
            index = users[0] if self.version == "v1" else users[-1]
            merged[index] = Message("user", TEXT_SEPARATOR.join([*systems, merged[index].content]))
        return [
            self._answer(message) if message.role == "assistant" else self._ask(message)
            for message in merged
        ]

    def lay_out_text(self, text: str, *, mode: Mode = "training") -> list[Turn]:
        """Lays out a plain text without a template: to be trained on whole, or to be continued."""
        if mode == "serving":
            return [Turn(text)]
        return [Turn(text, after=self._eos, is_supervised=True)]

    def encode_turns(self, conversations: Sequence[Sequence[Turn]]) -> list[Tokenized]:
        """Tokenizes many conversations at once, on all cores."""
        tokenizer = self._tokenizer
        assert tokenizer is not None, "a template without a tokenizer only checks"
        texts = [turn.text for turns in conversations for turn in turns]
        encoded = iter(tokenizer.encode_all(texts))
        return [
            _join(tokenizer, turns, list(itertools.islice(encoded, len(turns))))
            for turns in conversations
        ]

    def _ask(self, message: Message) -> Turn:
        if self.version == "v1":
            return Turn(f"{_BEGIN} {message.content} {_END}")
        return Turn(message.content, before=self._begin, after=self._end)

    def _answer(self, message: Message) -> Turn:
        # mistral-common strips spaces from the end of an answer in v3 but not in v1.
        text = message.content if self.version == "v1" else message.content.rstrip(" ")
        end = () if message.prefix else self._eos
        return Turn(text, after=end, is_supervised=message.weight != 0)


def _join(tokenizer: Tokenizer, turns: Sequence[Turn], texts: Sequence[np.ndarray]) -> Tokenized:
    pieces, text_bytes = [np.array([tokenizer.bos_id])], [np.array([0])]
    for turn, ids in zip(turns, texts, strict=True):
        pieces.append(np.array([*turn.before, *ids, *turn.after]))
        counts = tokenizer.count_text_bytes(turn.text, ids)
        text_bytes.append(np.pad(counts, (len(turn.before), len(turn.after))))
    is_supervised = [False, *(turn.is_supervised for turn in turns)]
    loss_mask = np.repeat(np.array(is_supervised, np.int32), [len(piece) for piece in pieces])
    tokens = np.concatenate(pieces).astype(np.int32)
    return Tokenized(tokens, loss_mask, np.concatenate(text_bytes))


def _merge(messages: Sequence[Message]) -> Iterator[Message]:
    """Drops system messages; joins neighbours of the same role unless their weights differ."""
    groups = itertools.groupby(messages, lambda message: (message.role, message.weight))
    for (role, weight), group in groups:
        *_, last = neighbours = list(group)
        if role != "system":
            content = TEXT_SEPARATOR.join(
                message.content for message in neighbours if message.content
            )
            yield Message(role, content, weight, last.prefix)


def _strip(text: str) -> str:
    while _BEGIN in text or _END in text:  # Removing one may create another: [IN[INST]ST].
        text = text.replace(_BEGIN, "").replace(_END, "")
    return text


def _reject_literals(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        for literal in (_BEGIN, _END):
            if literal in message.content:
                raise LiteralInstException(
                    f"{literal} in a text looks like that of template v1: set literal_inst to "
                    "keep or strip",
                    message=index,
                )
