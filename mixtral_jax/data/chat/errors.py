"""Everything that can be wrong with a conversation: one exception class per kind of mistake.

Kinds that mistral-common also has use its names and wording, so that a web search finds them.
"""

from typing import Literal

from mixtral_jax.config import ConfigError

_MAX_FOUND_CHARACTERS = 80


class ChatException(ConfigError):
    """A conversation that no template can express, or that has nothing to train on.

    Attributes:
        rule: the rule that the conversation breaks.
        message: the index of the message at fault, from 0; None if it is the whole conversation.
        found: what was found instead; may be empty.
        origin: where the conversation was read, such as `chats.jsonl:17`; set by its reader.
    """

    def __init__(self, rule: str, *, message: int | None = None, found: str = ""):
        super().__init__(rule)
        self.rule = rule
        self.message = message
        is_short = len(found) <= _MAX_FOUND_CHARACTERS
        self.found = found if is_short else f"{found[:_MAX_FOUND_CHARACTERS]}..."
        self.origin = ""

    def __str__(self) -> str:
        return self._explain(self.origin)

    def describe(self) -> str:
        """The kind of mistake and its explanation: `Kind: rule (messages[1], what was found)`."""
        return f"{type(self).__name__}: {self._explain()}"

    def _explain(self, *where: str) -> str:
        place = f"messages[{self.message}]" if self.message is not None else ""
        details = ", ".join(filter(None, (*where, place, self.found)))
        return f"{self.rule} ({details})" if details else self.rule


class InvalidMessageStructureException(ChatException):
    """The messages are not in an order that a conversation can have."""


class InvalidUserMessageException(ChatException):
    """A user message is not text, or a field of it changes what it means."""


class InvalidAssistantMessageException(ChatException):
    """An assistant message is empty or not text, or a field of it cannot be honoured."""


class InvalidSystemPromptException(ChatException):
    """A system message is not text, or a field of it changes what it means."""


class TokenizerException(ChatException):
    """The conversation uses tools, which no template here supports."""


class InvalidTextException(ChatException):
    """A text is empty, or cannot be encoded as UTF-8."""


class LiteralInstException(ChatException):
    """A text contains `[INST]` or `[/INST]`, which template v1 also writes itself, as text."""


class InvalidRowException(ChatException):
    """A row has no known format, does not follow it, or fills a field that changes its meaning."""


class NoSupervisedTokenException(ChatException):
    """All answers of the conversation have weight 0, so there is nothing to train on."""


# Raised when the content of a message of this role is wrong.
INVALID_CONTENT: dict[Literal["system", "user", "assistant"], type[ChatException]] = {
    "system": InvalidSystemPromptException,
    "user": InvalidUserMessageException,
    "assistant": InvalidAssistantMessageException,
}
