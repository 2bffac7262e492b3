"""Continues prompts: compiles the programs, runs them a few tokens at a time, and ends rows."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
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

# Number of tokens that `decode` writes before Python looks at them: few for a stream, whose text is
# to be shown soon, and more if Python only looks for stop strings.
STREAMED_TOKENS_AT_ONCE = 4
MAX_TOKENS_AT_ONCE = 32

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass
class Speed:
    """Tokens of all prompts, and the seconds that they took. Compiling is counted apart.

    `new_tokens` does not count the first new token of each row, which prefill writes.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
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
            tokens_per_second = tokens / max(seconds, 1e-9)
            return f"{tokens:,} tokens in {seconds:.2f} s ({tokens_per_second:,.1f} tokens/s)"

        return (
            f"prefill {rate(self.prompt_tokens, self.prefill_seconds)}, "
            f"decode {rate(self.new_tokens, self.decode_seconds)}, compiling "
            f"{self.compile_seconds:.1f} s"
        )


class Continuation:
    """The new tokens after one prompt.

    Attributes:
        finish_reason: None while the continuation goes on, `stop` after an end of text or a stop
            string, `length` at the maximum number of tokens.
    """

    def __init__(self, settings: Settings, eos_ids: Set[int], stream: TextStream | None):
        self._settings = settings
        self._eos_ids = eos_ids
        self._stream = stream
        self._ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def ids(self) -> list[int]:
        """The new ids, without the end of text and without what follows a stop string."""
        return self._ids[: self._stream.num_ids] if self._stream else self._ids

    @property
    def text(self) -> str:
        """The new text that may be shown so far. It needs a tokenizer."""
        assert self._stream is not None
        return self._stream.text

    @property
    def num_left(self) -> int:
        """The number of tokens that it may still get."""
        return 0 if self.finish_reason else self._settings.max_new_tokens - len(self._ids)

    def take(self, ids: Sequence[int]) -> None:
        """Adds the next ids, up to the end of the continuation."""
        for token in ids:
            if self.finish_reason is not None:
                return
            if token in self._eos_ids:
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
            # The text that was held back may complete a stop string.
            if self._stream.is_stopped:
                self.finish_reason = "stop"


class Generator:
    """Continues prompts with a model, on the mesh that holds its parameters.

    Args:
        tokenizer: turns new ids into text. Without one, there are no stop strings, and
            continuations have only ids.
        context: the maximum number of tokens of a prompt and its continuation together.
        eos_ids: ids that end a text, besides the tokenizer's own.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer | None,
        context: int,
        eos_ids: Iterable[int] = (),
    ):
        self.model = model
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.context = context
        self._more_eos_ids = frozenset(eos_ids)
        self._prefill_program = _Program(prefill, static="num_slots")
        self._decode_program = _Program(decode, static="room", donated="state")

    @property
    def eos_ids(self) -> frozenset[int]:
        """Each id that ends a text."""
        own = [] if self.tokenizer is None else [self.tokenizer.eos_id]
        return self._more_eos_ids.union(own)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings | Sequence[Settings],
        speed: Speed | None = None,
    ) -> list[Continuation]:
        """Continues all prompts to their ends, in one batch.

        Args:
            prompts: the ids of each prompt, BOS included.
            settings: one for all prompts, or one per prompt.
            speed: adds tokens and seconds to this record.

        Raises:
            ConfigError: a prompt is empty, too long, or has ids that the model does not know.
        """
        *_, continuations = self.stream(prompts, settings, speed, tokens_at_once=MAX_TOKENS_AT_ONCE)
        return continuations

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings | Sequence[Settings],
        speed: Speed | None = None,
        *,
        tokens_at_once: int = STREAMED_TOKENS_AT_ONCE,
        is_answer: bool = False,
    ) -> Iterator[list[Continuation]]:
        """As `generate`, but yields the continuations each time that they have grown.

        Args:
            tokens_at_once: how many tokens to write between two yields, at most
                `MAX_TOKENS_AT_ONCE`.
            is_answer: True for an answer in a chat, whose text begins with its first word. Other
                continuations may begin with the space after the last word of the prompt.
        """
        each = [settings] * len(prompts) if isinstance(settings, Settings) else list(settings)
        check_prompts(prompts, self.model.config.vocab_size, self.context)
        each = [s.within(self.context - len(ids)) for ids, s in zip(prompts, each, strict=True)]
        continuations = [
            self._begin(() if is_answer else ids, s) for ids, s in zip(prompts, each, strict=True)
        ]
        return self._run(prompts, each, continuations, speed or Speed(), tokens_at_once)

    def _begin(self, context: Sequence[int], settings: Settings) -> Continuation:
        if self.tokenizer is None:
            require(
                not settings.stop, "stop strings need a tokenizer, and this model came without one"
            )
            return Continuation(settings, self.eos_ids, None)
        stream = TextStream(self.tokenizer, context, settings.stop)
        return Continuation(settings, self.eos_ids, stream)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[Settings],
        continuations: list[Continuation],
        speed: Speed,
        tokens_at_once: int,
    ) -> Iterator[list[Continuation]]:
        rule = self._make_rule(settings)
        state = self._prefill(prompts, settings, rule, continuations, speed)
        yield continuations
        while any(continuation.finish_reason is None for continuation in continuations):
            state = self._decode(state, rule, continuations, speed, tokens_at_once)
            yield continuations

    def _make_rule(self, settings: Sequence[Settings]) -> Rule:
        num_choices, unused_ids = self.model.config.vocab_size, ()
        if self.tokenizer is not None:
            num_choices = min(num_choices, self.tokenizer.vocab_size)
            unused_ids = self.tokenizer.unused_ids
        sampling = lay_out_sampling(settings, self.mesh, self.model.rules)
        eos_ids = np.array(sorted(self.eos_ids), np.int32)
        return Rule(sampling, eos_ids, num_choices, unused_ids)

    def _prefill(self, prompts, settings, rule, continuations, speed) -> State:
        rows = lay_out(prompts, settings, self.mesh, self.model.rules)
        with self._on_mesh(), speed.compiling():
            run = self._prefill_program.compile(
                self.model, rows.tokens_BT, rows.lengths_B, rule, num_slots=rows.num_slots
            )
        with self._on_mesh():
            start = time.perf_counter()
            written = run(self.model, rows.tokens_BT, rows.lengths_B, rule)
            _hand_out(written.tokens_BC, continuations)
        speed.prompt_tokens += sum(map(len, prompts))
        speed.prefill_seconds += time.perf_counter() - start
        return written.state

    def _decode(self, state: State, rule: Rule, continuations, speed, tokens_at_once) -> State:
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
            run = self._decode_program.compile(*arguments, room=MAX_TOKENS_AT_ONCE)
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
    """A function for devices, compiled once per set of shapes."""

    def __init__(self, function: Callable, *, static: str, donated: str | None = None):
        self._jitted = jax.jit(function, static_argnames=static, donate_argnames=donated)
        self._compiled: dict[Any, Any] = {}

    def compile(self, *arguments: Any, **static: int) -> Callable:
        """The compiled function for `arguments` and all others of the same shapes."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves), *static.items())
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(*arguments, **static).compile()
        return self._compiled[key]


def _hand_out(tokens_BC: jax.Array, continuations: Sequence[Continuation]) -> int:
    """Waits for the tokens, gives each continuation its own, and returns their number."""
    count = 0
    # The batch may have more rows than prompts, to fill it up.
    for row, continuation in zip(np.asarray(tokens_BC), continuations, strict=False):
        ids = row[row != NO_TOKEN].tolist()
        continuation.take(ids)
        count += len(ids)
    return count
