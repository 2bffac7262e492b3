"""Which bytes of a Python source are code, comments, docstrings or other strings."""

import io
import tokenize
from collections.abc import Iterator

import numpy as np

PARTS = ("code", "comments", "docstrings", "other strings")
_CODE, _COMMENT, _DOCSTRING, _STRING = range(len(PARTS))

# Tokens after which a statement may begin.
_BEFORE_STATEMENT = {"ENCODING", "NEWLINE", "NL", "INDENT", "DEDENT", "COMMENT"}
# From Python 3.12 on, an f-string consists of several tokens.
_STRINGS = {"STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}


def find_parts(source: str) -> np.ndarray | None:
    """Finds the part of each UTF-8 byte of a source, as uint8 indices into `PARTS`.

    Returns None if Python cannot tokenize the source to its end.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    sizes = _count_bytes(source)
    # The first byte of each character, and the first character of each line.
    starts = np.concatenate([[0], np.cumsum(sizes)])
    lines = np.cumsum([0, *(len(line) + 1 for line in source.split("\n"))])
    parts = np.full(starts[-1], _CODE, np.uint8)
    for token, part in _find_texts(tokens):
        (first_line, first), (last_line, last) = token.start, token.end
        begin, end = lines[first_line - 1] + first, lines[last_line - 1] + last
        parts[starts[begin] : starts[end]] = part
    return parts


def _find_texts(tokens: list[tokenize.TokenInfo]) -> Iterator[tuple[tokenize.TokenInfo, int]]:
    """Finds the tokens that are not code. A docstring is a string that is a whole statement."""
    kinds = [tokenize.tok_name[token.type] for token in tokens]
    for before, kind, after, token in zip(
        ["NEWLINE", *kinds], kinds, [*kinds[1:], ""], tokens, strict=False
    ):
        if kind == "COMMENT":
            yield token, _COMMENT
        elif kind in _STRINGS:
            is_statement = (
                kind == "STRING" and before in _BEFORE_STATEMENT and after in ("NEWLINE", "COMMENT")
            )
            yield token, _DOCSTRING if is_statement else _STRING


def _count_bytes(text: str) -> np.ndarray:
    """Number of UTF-8 bytes of each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + np.sum([codes >= limit for limit in (0x80, 0x800, 0x10000)], axis=0)
