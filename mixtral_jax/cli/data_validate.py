"""Names every bad row of a file by line and reason, and counts the others.

A row is bad if no conversation can be made of it.
"""

import collections
import dataclasses
from collections.abc import Iterator

from mixtral_jax.cli.data_rows import EncodedRow, leave_the_pipe, make_rows_parser, open_rows
from mixtral_jax.config import require
from mixtral_jax.data.field_names import describe_unread
from mixtral_jax.data.readers import BadRow


def main(arguments: list[str]) -> int:
    """`data validate CHATS`: 1 if any row is bad, 0 if none is."""
    parser = make_rows_parser("validate", __doc__)
    parser.add_argument(
        "--sequence_length", type=int, help="of the run to come: to name rows that are longer"
    )
    flags = parser.parse_args(arguments)
    length = flags.sequence_length
    require(length is None or length >= 2, f"--sequence_length={length} must be at least 2")
    tally = Tally(length)
    opened = open_rows(
        flags,
        only_supervised=flags.mode == "training",
        needs_tokens=length is not None,
        hint=", or leave out --sequence_length, which needs a tokenizer" if length else "",
    )
    try:
        for row in opened.rows:
            if line := tally.add(row):
                print(line)
        for line in tally.describe():
            print(line)
        if opened.no_tokens:
            print(f"tokens are not counted: {opened.no_tokens}")
    except BrokenPipeError:
        leave_the_pipe()
    return 1 if tally.num_bad else 0


@dataclasses.dataclass
class Tally:
    """What the rows so far add up to."""

    sequence_length: int | None
    num_rows: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_long: int = 0
    longest: int = 0
    bad_kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unread: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def num_bad(self) -> int:
        """Rows that no conversation can be made of."""
        return self.bad_kinds.total()

    def add(self, row: EncodedRow | BadRow) -> str:
        """Counts a row; returns a line about it if there is something to report."""
        self.num_rows += 1
        if isinstance(row, BadRow):
            self.bad_kinds[row.kind] += 1
            return f"{row.origin}: {row.reason}"
        self.unread.update(row.unread)
        num_tokens = len(row.chat.tokens)
        self.num_tokens += num_tokens
        self.num_supervised += int(row.chat.require_mask().sum())
        self.longest = max(self.longest, num_tokens)
        if self.sequence_length is None or num_tokens - 1 <= self.sequence_length:
            return ""
        self.num_long += 1
        return (
            f"{row.origin}: {num_tokens} tokens are longer than a row: data.chat.long_rows says "
            "what becomes of it"
        )

    def describe(self) -> Iterator[str]:
        """Lines of totals."""
        for kind, count in self.bad_kinds.most_common():
            yield f"{count:>8,} x {kind}"
        yield f"{self.num_bad:,} of {self.num_rows:,} rows are bad"
        if self.unread:
            yield f"not read: {describe_unread(self.unread, max_names=None)}"
        if not self.num_tokens:
            return
        share = self.num_supervised / self.num_tokens
        yield (
            f"{self.num_tokens:,} tokens in the others, {self.num_supervised:,} of them to be "
            f"learnt ({share:.1%})"
        )
        long = f", {self.num_long:,} longer than a row" if self.sequence_length else ""
        yield f"the longest has {self.longest:,} tokens{long}"
