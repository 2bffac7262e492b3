"""Runs the tasks of EleutherAI's lm-evaluation-harness: `pip install -e '.[eval]'`.

    results = lm_eval.simple_evaluate(HarnessModel(load_pretrained(MODEL)), tasks=["hellaswag"])

Every prompt begins with BOS, as in Mixtral's training. The chat templates of the harness are not
supported: they are strings, in which a `</s>` that a user wrote looks like the end of text.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-not-found]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]
from tqdm import tqdm

from mixtral_jax.config import require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluate.scoring import Pair, score_pairs
from mixtral_jax.generate.settings import Settings
from mixtral_jax.pretrained import Pretrained

# The limit of a continuation if the task does not set one.
_DEFAULT_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """Adapts a loaded model to the interface of the harness.

    Args:
        max_length: the maximum number of tokens that the model sees at once. By default the
            sequence length in its config. Of a longer context, BOS and the end are kept. A context
            that fits is kept whole, and gets fewer new tokens than the task allows if they do not
            fit too. A longer text is scored in windows.
        batch_size: the number of prompts that are continued together.

    Raises:
        ConfigError: the model came without a tokenizer.
    """

    def __init__(self, loaded: Pretrained, max_length: int | None = None, batch_size: int = 16):
        super().__init__()
        require(
            loaded.tokenizer,
            "tasks are text, so they need a tokenizer, and this model came without one",
        )
        assert loaded.tokenizer is not None
        self._loaded = loaded
        self._pieces: Tokenizer = loaded.tokenizer
        self._max_length = max_length or loaded.config.train.sequence_length
        self._batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        """The id of the end of text (EOS)."""
        return self._pieces.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the beginning of text (BOS), which precedes a text without a context."""
        return self._pieces.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, with BOS before them unless `add_special_tokens` is False."""
        ids = self._pieces.encode(string)
        return ids if add_special_tokens is False else [self._pieces.bos_id, *ids]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        scores = score_pairs(self._loaded, pairs)
        for number, score in tqdm(scores, "scoring", len(pairs), disable=disable_tqdm):
            answers[number] = (score.loglikelihood, score.is_greedy)
            if (request := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", request, answers[number])
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Shortens the context at its beginning, so that it fits with the whole continuation."""
        # The last token is predicted, but the model never reads it.
        room = self._max_length + 1 - len(continuation)
        require(
            room >= 1,
            f"a continuation of {len(continuation)} tokens does not fit in "
            f"max_length={self._max_length}",
        )
        return Pair(self._cut(context, room), continuation)

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The ids, or BOS and the last `length - 1` of them if there are more."""
        if len(ids) <= length:
            return ids
        begins_text = ids[0] == self._pieces.bos_id
        num_last = length - begins_text
        return [*ids[:begins_text], *ids[len(ids) - num_last :]]

    def _make_room(self, ids: list[int], settings: Settings) -> tuple[list[int], Settings]:
        """The context and settings of a continuation, so that both fit in `max_length`.

        The context comes first: a task's limit is often longer than any answer. Only a context that
        fills the window by itself is cut, to leave half of it to the answer.
        """
        require(self._max_length > 1, "max_length=1 leaves no room for new tokens")
        if len(ids) >= self._max_length:
            half = self._max_length // 2
            ids = self._cut(ids, max(self._max_length - settings.max_new_tokens, half))
        room = self._max_length - len(ids)
        return ids, dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text. Texts over `max_length` are split in windows."""
        windows = [
            (number, None, *make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self._max_length,
                1,
            )
        ]
        scored = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (number, *_), (loglikelihood, _) in zip(windows, scored, strict=True):
            totals[number] += loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The generated text after each context, up to the first stop string of the task."""
        prompts: list[list[int]] = []
        settings: list[Settings] = []
        num_changed = 0
        for number, request in enumerate(requests):
            asked = self.tok_encode(request.args[0]), _read_settings(request.args[1], number)
            prompt, its_settings = self._make_room(*asked)
            prompts.append(prompt)
            settings.append(its_settings)
            num_changed += (prompt, its_settings) != asked
        if num_changed:
            print(
                f"{num_changed:,} of {len(requests):,} contexts do not fit in max_length="
                f"{self._max_length} with the new tokens that their task allows: they get fewer "
                "new tokens, and those longer than max_length lose their beginning",
                file=sys.stderr,
            )
        answers = [""] * len(requests)
        for numbers in tqdm(list(self._batches(prompts)), "writing", disable=disable_tqdm):
            rows = self._loaded.generator.generate(
                [prompts[n] for n in numbers], [settings[n] for n in numbers]
            )
            for number, row in zip(numbers, rows, strict=True):
                answers[number] = row.text
                self.cache_hook.add_partial("generate_until", requests[number].args, row.text)
        return answers

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Batches of indices of prompts with similar lengths, the longest first."""
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for first in range(0, len(order), self._batch_size):
            yield order[first : first + self._batch_size]


def _read_settings(kwargs: Mapping[str, Any], number: int) -> Settings:
    """Settings from the harness's `generation_kwargs`. Unknown keys raise an error.

    Each request has its own seed, because a task may repeat a request to get several samples.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), _DEFAULT_MAX_NEW_TOKENS))
    given.pop("do_sample")  # The temperature decides this.
    renamed = {"until": "stop", "max_gen_toks": "max_new_tokens"}
    known = {"temperature", "top_p", "top_k", *renamed}
    unknown = ", ".join(sorted(given.keys() - known))
    require(not unknown, f"generation_kwargs {unknown} are not supported: leave them out")
    if not given.get("temperature"):  # Tasks may say how to sample, and then not to sample.
        given = {name: value for name, value in given.items() if name not in ("top_p", "top_k")}
    return Settings.of(
        seed=number, **{renamed.get(name, name): value for name, value in given.items()}
    )
