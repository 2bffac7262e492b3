"""From new ids to text that may be shown: whole characters, and nothing past a stop string."""

import bisect
from collections.abc import Sequence

from mixtral_jax.data.tokenizer import Tokenizer

# What the tokenizer writes for each byte that is no character, or not yet: a character has at most
# three such bytes.
_NO_CHARACTER = "\ufffd"
_MOST_UNFINISHED = 3
# Ids before those to be shown that decide how these begin: whether with a space.
_CONTEXT = 8


class TextStream:
    """Turns ids, a few at a time, into text.

    Args:
        context: ids before the first one. After none, the text begins without the space that begins
            a first word.
        stop: strings before which the text ends.

    Attributes:
        is_stopped: whether a stop string has come.
        num_ids: how many ids lie before the end of the text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()):
        self._decode = tokenizer.decode
        self._stop = tuple(stop)
        self._window = list(context[-_CONTEXT:])
        self._seen = len(
            self._decode(self._window)
        )  # Characters of the window that are in `_text`, or before it.
        self._text = ""  # Whole characters.
        self._lengths: list[int] = []  # Of `_text`, after each id.
        self._end = 0  # Of what may be shown of it.
        self.is_stopped = False
        self.num_ids = 0

    @property
    def text(self) -> str:
        """All that may be shown so far."""
        return self._text[: self._end]

    def push(self, ids: Sequence[int]) -> None:
        """Takes the next ids."""
        for token in ids:
            if self.is_stopped:
                return
            self._window.append(int(token))
            self._extend(_MOST_UNFINISHED)
            self._lengths.append(len(self._text))
            self._show(is_last=False)

    def finish(self) -> None:
        """No more ids will come: shows what was held back."""
        if not self.is_stopped:
            self._extend(0)
            self._lengths[-1:] = [len(self._text)] if self._lengths else []
            self._show(is_last=True)

    def _extend(self, most_unfinished: int) -> None:
        whole = self._decode(self._window)
        end = len(whole)
        while (
            end > max(self._seen, len(whole) - most_unfinished) and whole[end - 1] == _NO_CHARACTER
        ):
            end -= 1
        self._text += whole[self._seen : end]
        self._seen = end
        if end == len(whole) and len(self._window) > 4 * _CONTEXT:
            self._forget()

    def _forget(self) -> None:
        """Keeps the end of the window alone, as far as that has a character: a space is dropped
        before the first.
        """
        window = self._window[-_CONTEXT:]
        if text := self._decode(window):
            self._window, self._seen = window, len(text)

    def _show(self, is_last: bool) -> None:
        # A stop string can begin before what is new, but not before what has been shown.
        begins = [at for at in (self._text.find(stop, self._end) for stop in self._stop) if at >= 0]
        self.is_stopped = bool(begins)
        self._end = min(
            begins, default=len(self._text) - (0 if is_last else self._unfinished_stop())
        )
        self.num_ids = self._count_ids() if begins else len(self._lengths)

    def _count_ids(self) -> int:
        """Those that the text up to its end needs; one that reaches beyond it is none of them."""
        count = bisect.bisect_left(self._lengths, self._end)
        return count + (0 < self._end == self._lengths[count])

    def _unfinished_stop(self) -> int:
        """Characters at the end that may turn out to be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(self._text) - self._end), 0, -1)
        is_begun = (
            length
            for length in lengths
            if any(s.startswith(self._text[-length:]) for s in self._stop)
        )
        return next(is_begun, 0)
