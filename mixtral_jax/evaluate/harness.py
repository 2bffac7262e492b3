"""EleutherAI's lm-evaluation-harness, asking a model of ours: `pip install 'mixtral_jax[eval]'`.

    results = lm_eval.simple_evaluate(HarnessModel(load_pretrained(DIR)), tasks=["hellaswag"])

Every prompt begins with BOS, as Mixtral was trained. Chat templates of the harness are strings,
which could not tell a written `</s>` from an end of text: there are none here.
"""

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

_NEW_TOKENS = 256  # Where a task does not say how many.


class HarnessModel(TemplateLM):
    """A loaded model, as the harness asks for it.

    Args:
        max_length: the most tokens that the model sees at once; by default what it was made for.
            Contexts lose their beginning, and texts are scored in windows, where they are longer.
        batch_size: prompts that are continued together.

    Raises:
        ConfigError: the model came without a tokenizer.
    """

    def __init__(self, loaded: Pretrained, max_length: int | None = None, batch_size: int = 16):
        super().__init__()
        require(
            loaded.tokenizer,
            "tasks are text: they need a tokenizer, and this model came without one",
        )
        assert loaded.tokenizer is not None
        self._loaded = loaded
        self._pieces: Tokenizer = loaded.tokenizer
        self._max_length = max_length or loaded.config.train.sequence_length
        self._batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self._pieces.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The beginning of text, which stands before a text without a context."""
        return self._pieces.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, after BOS unless told otherwise."""
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
            if (asked := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answers[number])
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """All of a continuation, and as much of the end of its context as the model sees besides."""
        # The last token is never read, only predicted.
        room = self._max_length + 1 - len(continuation)
        require(
            room >= 1,
            f"a continuation of {len(continuation)} tokens does not fit in "
            f"max_length={self._max_length}",
        )
        return Pair(context[-room:], continuation)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, in windows where it is longer than the model sees at
        once.
        """
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
        """The text after each context, up to the first of the strings that the task names."""
        settings = [
            _read_settings(request.args[1], number) for number, request in enumerate(requests)
        ]
        prompts = [
            self.tok_encode(request.args[0])[-max(1, self._max_length - asked.max_new_tokens) :]
            for request, asked in zip(requests, settings, strict=True)
        ]
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
        """Numbers of prompts of like length, the longest first."""
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for first in range(0, len(order), self._batch_size):
            yield order[first : first + self._batch_size]


def _read_settings(asked: Mapping[str, Any], number: int) -> Settings:
    """From the harness's `generation_kwargs`; those without a meaning here are refused, not
    overlooked.

    Each request has a seed of its own, for a task may ask the same several times.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), _NEW_TOKENS))
    given.pop("do_sample")  # The temperature says it.
    renamed = {"until": "stop", "max_gen_toks": "max_new_tokens"}
    known = {"temperature", "top_p", "top_k", *renamed}
    require(
        given.keys() <= known,
        f"generation_kwargs {', '.join(sorted(given.keys() - known))} have no meaning here",
    )
    return Settings.of(
        seed=number, **{renamed.get(name, name): value for name, value in given.items()}
    )
