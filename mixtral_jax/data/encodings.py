"""The encoding of a text, where it is not UTF-8."""

import codecs
import io

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def find_other_encoding(content: io.BufferedReader) -> str:
    """What a text that was just opened is instead of UTF-8, by its mark, or by zeros beside
    letters; empty if it may be UTF-8.
    """
    head = content.peek(4)[:4]
    if head.startswith(_UTF32_MARKS) or b"\0\0\0" in (head[:3], head[1:]):
        name = "UTF-32"
    elif head.startswith(_UTF16_MARKS) or b"\0\0" in (head[::2], head[1::2]):
        name = "UTF-16"
    else:
        return ""
    return f"{name}, not UTF-8: convert it, as `iconv -f {name} -t UTF-8` does"


def require_utf8(content: io.BufferedReader) -> None:
    """Raises ValueError if text that was just opened is in another encoding."""
    if encoding := find_other_encoding(content):
        raise ValueError(f"it is {encoding}")
