"""Turns new ids into text that may be shown: whole characters, and nothing past a stop string."""

import bisect
from collections.abc import Sequence

from mixtral_jax.data.tokenizer import Tokenizer

# The tokenizer writes this for each byte that is not part of a whole character. At most three bytes
# of an unfinished character can be waiting for the rest of it.
_REPLACEMENT_CHARACTER = "\ufffd"
_MAX_UNFINISHED_BYTES = 3
# Number of ids kept from before the new ones. They decide whether the new text begins with a space.
_NUM_CONTEXT_IDS = 8
# The window of ids that are decoded again is shortened when it is longer than this.
_MAX_WINDOW_IDS = 32


class TextStream:
    """Turns ids, a few at a time, into text.

    Args:
        context: the ids before the first one. Without any, the text begins without the space that
            a tokenizer puts before a first word.
        stop: the text ends before the first of these strings.

    Attributes:
        is_stopped: True once a stop string was found.
        num_ids: the number of ids up to the end of the text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()):
        self._decode = tokenizer.decode
        self._stop = tuple(stop)
        # The last ids, which are decoded again with each new one.
        self._window = list(context[-_NUM_CONTEXT_IDS:])
        # Characters of the decoded window that are in `_text` already, or come before it.
        self._num_taken = len(self._decode(self._window))
        # All whole characters so far, the length of this text after each id, and the length of the
        # part that may be shown.
        self._text = ""
        self._lengths: list[int] = []
        self._end = 0
        self.is_stopped = False
        self.num_ids = 0

    @property
    def text(self) -> str:
        """The text that may be shown so far."""
        return self._text[: self._end]

    def push(self, ids: Sequence[int]) -> None:
        """Takes the next ids."""
        for token in ids:
            if self.is_stopped:
                return
            self._window.append(int(token))
            self._extend(_MAX_UNFINISHED_BYTES)
            self._lengths.append(len(self._text))
            self._show(is_last=False)

    def finish(self) -> None:
        """Shows the text that was held back. Call it when no more ids will come."""
        if not self.is_stopped:
            self._extend(0)
            self._lengths[-1:] = [len(self._text)] if self._lengths else []
            self._show(is_last=True)

    def _extend(self, max_unfinished: int) -> None:
        decoded = self._decode(self._window)
        end = len(decoded)
        least_end = max(self._num_taken, len(decoded) - max_unfinished)
        while end > least_end and decoded[end - 1] == _REPLACEMENT_CHARACTER:
            end -= 1
        self._text += decoded[self._num_taken : end]
        self._num_taken = end
        if end == len(decoded) and len(self._window) > _MAX_WINDOW_IDS:
            self._shorten_window()

    def _shorten_window(self) -> None:
        """Keeps only the end of the window, if that has text.

        Without text before it, the tokenizer would drop the space before the next word.
        """
        window = self._window[-_NUM_CONTEXT_IDS:]
        if text := self._decode(window):
            self._window, self._num_taken = window, len(text)

    def _show(self, is_last: bool) -> None:
        # A stop string can begin before the new text, but not before the end of the shown text.
        begins = [at for at in (self._text.find(stop, self._end) for stop in self._stop) if at >= 0]
        self.is_stopped = bool(begins)
        num_held_back = 0 if is_last else self._unfinished_stop()
        self._end = min(begins, default=len(self._text) - num_held_back)
        self.num_ids = self._count_ids() if begins else len(self._lengths)

    def _count_ids(self) -> int:
        """Counts the ids whose text lies before the end; one that goes beyond it does not count."""
        count = bisect.bisect_left(self._lengths, self._end)
        return count + (0 < self._end == self._lengths[count])

    def _unfinished_stop(self) -> int:
        """The number of characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(self._text) - self._end), 0, -1)
        is_begun = (
            length
            for length in lengths
            if any(s.startswith(self._text[-length:]) for s in self._stop)
        )
        return next(is_begun, 0)
