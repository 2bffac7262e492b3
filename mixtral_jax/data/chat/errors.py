"""What can be wrong with a conversation, a class for each kind of mistake, and where it is.

Kinds that mistral-common also has bear its names and its words, so that a search for one finds the
other.
"""

from typing import Literal

from mixtral_jax.config import ConfigError

_SHOWN = 80  # Characters of what was found.


class ChatException(ConfigError):
    """A conversation that no template can hold, or that nothing can be learnt from.

    Attributes:
        rule: what holds for every conversation, and does not for this one.
        message: the index of the message at fault, from 0; None where it is the conversation as a
            whole.
        found: what was there instead, if that needs words.
        origin: where the conversation was read, such as `chats.jsonl:17`; set by whoever read it.
    """

    def __init__(self, rule: str, *, message: int | None = None, found: str = ""):
        super().__init__(rule)
        self.rule = rule
        self.message = message
        self.found = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}..."
        self.origin = ""

    def __str__(self) -> str:
        return self._explain(self.origin)

    def describe(self) -> str:
        """The kind of mistake and all there is to say but for the row:

        `Kind: rule (messages[1], what was found)`.
        """
        return f"{type(self).__name__}: {self._explain()}"

    def _explain(self, *where: str) -> str:
        place = f"messages[{self.message}]" if self.message is not None else ""
        details = ", ".join(filter(None, (*where, place, self.found)))
        return f"{self.rule} ({details})" if details else self.rule


class InvalidMessageStructureException(ChatException):
    """The messages do not follow one another as those of a conversation do."""


class InvalidUserMessageException(ChatException):
    """A user message is not text."""


class InvalidAssistantMessageException(ChatException):
    """An assistant message is empty or not text, or its weight or prefix is wrong."""


class InvalidSystemPromptException(ChatException):
    """A system message is not text."""


class TokenizerException(ChatException):
    """The conversation uses tools, for which there is no template here."""


class InvalidTextException(ChatException):
    """A text has no UTF-8 form."""


class LiteralInstException(ChatException):
    """A text contains `[INST]` or `[/INST]`, which template v1 cannot tell from its own."""


class InvalidRowException(ChatException):
    """A row is of no known format, or not filled in as its format says."""


class NoSupervisedTokenException(ChatException):
    """Every answer of the conversation has weight 0: there is nothing to train on."""


# The kind of mistake that a message of each role makes when its content is wrong.
INVALID_CONTENT: dict[Literal["system", "user", "assistant"], type[ChatException]] = {
    "system": InvalidSystemPromptException,
    "user": InvalidUserMessageException,
    "assistant": InvalidAssistantMessageException,
}
