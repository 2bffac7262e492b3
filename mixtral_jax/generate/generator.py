"""Continues prompts: compiles what is needed, runs it a few tokens at a time, and ends rows that
are over.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from mixtral_jax.config import require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generate.batch import check_prompts, lay_out, lay_out_sampling, place
from mixtral_jax.generate.programs import NO_TOKEN, Rule, State, decode, prefill
from mixtral_jax.generate.settings import Settings
from mixtral_jax.generate.text import TextStream
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.parallel.mesh import matmul_precision

# Tokens between two looks at what was written: when it is shown as it comes, and when only stop
# strings are sought.
STREAMED, UNSEEN = 4, 32

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass
class Speed:
    """What reading and writing took, in seconds, without compiling; and how many tokens that was,
    of all prompts.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0  # after the first of each row, which prefill writes
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts the seconds of the block as compiling."""
        start = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - start

    def __str__(self) -> str:
        def rate(tokens: int, seconds: float) -> str:
            return f"{tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"

        return (
            f"prefill {rate(self.prompt_tokens, self.prefill_seconds)}, "
            f"decode {rate(self.new_tokens, self.decode_seconds)}, compiling "
            f"{self.compile_seconds:.1f} s"
        )


class Continuation:
    """What has been written after one prompt.

    Attributes:
        finish_reason: None while it goes on; `stop` at the model's own end or a stop string,
            `length` at the limit.
    """

    def __init__(self, settings: Settings, eos_id: int | None, stream: TextStream | None):
        self._settings = settings
        self._eos_id = eos_id
        self._stream = stream
        self._ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def ids(self) -> list[int]:
        """The new ids, without the end of text and what follows a stop string."""
        return self._ids[: self._stream.num_ids] if self._stream else self._ids

    @property
    def text(self) -> str:
        """The new text, as far as it is settled; needs a tokenizer."""
        assert self._stream is not None
        return self._stream.text

    @property
    def num_left(self) -> int:
        """How many tokens it may still get."""
        return 0 if self.finish_reason else self._settings.max_new_tokens - len(self._ids)

    def take(self, ids: Sequence[int]) -> None:
        """Goes on with the next ids, unless it is over."""
        for token in ids:
            if self.finish_reason is not None:
                return
            if token == self._eos_id:
                self._finish("stop")
                return
            self._ids.append(int(token))
            if self._stream is not None:
                self._stream.push([token])
                if self._stream.is_stopped:
                    self.finish_reason = "stop"
                    return
            if len(self._ids) == self._settings.max_new_tokens:
                self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._stream is not None:
            self._stream.finish()
            if self._stream.is_stopped:  # By what had been held back.
                self.finish_reason = "stop"


class Generator:
    """A model that continues prompts, on the mesh that it lies on.

    Args:
        tokenizer: for text; without one, prompts are ids, there are no stop strings, and no end of
            text.
        context: the most tokens that a prompt and its continuation have together; there, a
            continuation ends.
    """

    def __init__(
        self, model: Transformer, mesh: jax.sharding.Mesh, tokenizer: Tokenizer | None, context: int
    ):
        self.model = model
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.context = context
        self._prefill = _Program(prefill, static="num_slots")
        self._decode = _Program(decode, static="room", donated="state")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings | Sequence[Settings],
        speed: Speed | None = None,
    ) -> list[Continuation]:
        """Continues all prompts to their ends, in one batch.

        Args:
            prompts: ids, BOS included.
            settings: for all, or one for each.
            speed: where to count tokens and seconds.

        Raises:
            ConfigError: a prompt is empty, too long, or has ids that the model does not know.
        """
        *_, continuations = self.stream(prompts, settings, speed, tokens_at_once=UNSEEN)
        return continuations

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings | Sequence[Settings],
        speed: Speed | None = None,
        *,
        tokens_at_once: int = STREAMED,
        is_answer: bool = False,
    ) -> Iterator[list[Continuation]]:
        """As `generate`, but gives the continuations each time that they have grown.

        Args:
            is_answer: the text begins with its first word, not with the space that parts this from
                the prompt's last.
        """
        asked = [settings] * len(prompts) if isinstance(settings, Settings) else list(settings)
        check_prompts(prompts, self.model.config.vocab_size, self.context)
        asked = [s.within(self.context - len(ids)) for ids, s in zip(prompts, asked, strict=True)]
        continuations = [
            self._begin(() if is_answer else ids, s) for ids, s in zip(prompts, asked, strict=True)
        ]
        return self._run(prompts, asked, continuations, speed or Speed(), tokens_at_once)

    def _begin(self, context: Sequence[int], settings: Settings) -> Continuation:
        if self.tokenizer is None:
            require(
                not settings.stop, "stop strings need a tokenizer, and this model came without one"
            )
            return Continuation(settings, None, None)
        return Continuation(
            settings, self.tokenizer.eos_id, TextStream(self.tokenizer, context, settings.stop)
        )

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[Settings],
        continuations: list[Continuation],
        speed: Speed,
        tokens_at_once: int,
    ) -> Iterator[list[Continuation]]:
        rule = self._make_rule(asked)
        state = self._read(prompts, asked, rule, continuations, speed)
        yield continuations
        while any(continuation.finish_reason is None for continuation in continuations):
            state = self._write(state, rule, continuations, speed, tokens_at_once)
            yield continuations

    def _make_rule(self, asked: Sequence[Settings]) -> Rule:
        num_choices, eos_id = self.model.config.vocab_size, -1
        if self.tokenizer is not None:
            num_choices, eos_id = min(num_choices, self.tokenizer.vocab_size), self.tokenizer.eos_id
        return Rule(
            lay_out_sampling(asked, self.mesh, self.model.rules), np.int32(eos_id), num_choices
        )

    def _read(self, prompts, asked, rule, continuations, speed) -> State:
        rows = lay_out(prompts, asked, self.mesh, self.model.rules)
        with self._on_mesh(), speed.compiling():
            run = self._prefill.compile(
                self.model, rows.tokens_BT, rows.lengths_B, rule, num_slots=rows.num_slots
            )
        with self._on_mesh():
            start = time.perf_counter()
            written = run(self.model, rows.tokens_BT, rows.lengths_B, rule)
            _hand_out(written.tokens_BC, continuations)
        speed.prompt_tokens += sum(map(len, prompts))
        speed.prefill_seconds += time.perf_counter() - start
        return written.state

    def _write(self, state: State, rule: Rule, continuations, speed, tokens_at_once) -> State:
        wanted_B = np.zeros(len(state.token_B), bool)
        wanted_B[: len(continuations)] = [
            continuation.finish_reason is None for continuation in continuations
        ]
        num_tokens = min(
            tokens_at_once, max(continuation.num_left for continuation in continuations)
        )
        arguments = (
            self.model,
            state,
            place(wanted_B, self.mesh, self.model.rules),
            rule,
            np.int32(num_tokens),
        )
        with self._on_mesh(), speed.compiling():
            run = self._decode.compile(*arguments, room=UNSEEN)
        with self._on_mesh():
            start = time.perf_counter()
            written = run(*arguments)
            speed.new_tokens += _hand_out(written.tokens_BC, continuations)
        speed.decode_seconds += time.perf_counter() - start
        return written.state

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        with (
            jax.set_mesh(self.mesh),
            jax.default_matmul_precision(matmul_precision(self.model.config.dtype)),
        ):
            yield


class _Program:
    """A function for devices, compiled once for each set of shapes."""

    def __init__(self, function: Callable, *, static: str, donated: str | None = None):
        self._jitted = jax.jit(function, static_argnames=static, donate_argnames=donated)
        self._compiled: dict[Any, Any] = {}

    def compile(self, *arguments: Any, **static: int) -> Callable:
        """What to call with `arguments`, or others of their shapes."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves), *static.items())
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(*arguments, **static).compile()
        return self._compiled[key]


def _hand_out(tokens_BC: jax.Array, continuations: Sequence[Continuation]) -> int:
    """Waits for the tokens, gives each row its own, and counts them."""
    count = 0
    for row, continuation in zip(
        np.asarray(tokens_BC), continuations, strict=False
    ):  # Other rows only fill up.
        ids = row[row != NO_TOKEN].tolist()
        continuation.take(ids)
        count += len(ids)
    return count
