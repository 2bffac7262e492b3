"""Talks with an instruct model in the terminal."""

import contextlib
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from mixtral_jax.cli.flags import make_verb_parser
from mixtral_jax.cli.model_flags import (
    add_model_flags,
    add_settings_flags,
    open_model,
    parse_model_flags,
    read_settings,
)
from mixtral_jax.config import ConfigError, require
from mixtral_jax.generate.settings import Settings
from mixtral_jax.runs.console import note

if TYPE_CHECKING:
    from mixtral_jax.pretrained import Pretrained

_DEFAULTS = Settings(max_new_tokens=1024)


def main(arguments: list[str]) -> int:
    """`chat --checkpoint MODEL`: a message per line of standard input, answers on its output."""
    parser = make_verb_parser(__doc__, "chat")
    add_model_flags(parser)
    parser.add_argument("--system", help="the system message, before the first message")
    parser.add_argument(
        "--safe_mode", action="store_true", help="put Mistral's guardrail before that"
    )
    add_settings_flags(parser, _DEFAULTS)
    flags, model, _ = parse_model_flags(parser, arguments)
    settings = read_settings(flags)

    from mixtral_jax.parallel.processes import join_processes

    with join_processes(model.launch) as processes:
        require(
            processes.count == 1,
            "chat is for one process: several cannot read one terminal; use generate",
        )
        loaded = open_model(model, processes)
        require(
            loaded.tokenizer,
            f"--checkpoint={flags.checkpoint} came without a tokenizer: a chat needs one",
        )
        conversation = Conversation(loaded, flags.system, settings, safe_mode=flags.safe_mode)
        conversation.run(read_messages(sys.stdin))
    return 0


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(
        self, loaded: "Pretrained", system: str | None, settings: Settings, *, safe_mode: bool
    ):
        self._loaded = loaded
        self._settings: dict[str, Any] = {**vars(settings), "safe_mode": safe_mode}
        self._messages = [{"role": "system", "content": system}] if system else []
        from mixtral_jax.generate.generator import Speed

        self._speed = Speed()

    def run(self, questions: Iterator[str]) -> None:
        """Answers each, until there is none or at Ctrl-C; says at the end how fast that was."""
        with contextlib.suppress(KeyboardInterrupt):
            for question in questions:
                self._take(question)
        if self._speed.prompt_tokens:
            note(f"\n{self._speed}" if sys.stdin.isatty() else self._speed)

    def _take(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        try:
            answer = self._answer(sys.stdout)
        except ConfigError as error:
            note(f"error: {error}")
            answer = ""
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()  # A template holds no question without an answer.

    def _answer(self, output: IO[str]) -> str:
        """Writes the answer as it comes; at Ctrl-C it ends where it is."""
        pieces = []
        # What is written here cannot deceive anyone but who writes it.
        answer = self._loaded.stream_chat(
            self._messages, literal_inst="keep", speed=self._speed, **self._settings
        )
        try:
            for piece in answer:
                pieces.append(piece)
                output.write(piece)
                output.flush()
        except KeyboardInterrupt:
            note(" (interrupted)")
        output.write("\n")
        output.flush()
        return "".join(pieces)


def read_messages(source: IO[str]) -> Iterator[str]:
    """The lines of `source` that are not blank; a terminal is asked for them, until Ctrl-D."""
    if source.isatty():
        import readline  # noqa: F401  It lets `input` edit lines.

        note("Ctrl-D leaves, Ctrl-C ends an answer")
    while line := _read_line(source):
        if line.strip():
            yield line.strip("\n")


def _read_line(source: IO[str]) -> str:
    """The next line with its end, or nothing."""
    if not source.isatty():
        return source.readline()
    try:
        return input("> ") + "\n"
    except EOFError:
        return ""
