"""Reads the special tokens that tokenizer_config.json and special_tokens_map.json name."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import require_kind
from mixtral_jax.checkpoint.formats.tokenizer_keys import SPECIAL_TOKENS
from mixtral_jax.config import require

_LISTS = ("additional_special_tokens", "extra_special_tokens")
NAMES = tuple(name for name in SPECIAL_TOKENS if name not in _LISTS)
# What an added token says of the text around it.
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class SpecialTokens:
    """The special tokens of a folder, each a text.

    Args:
        files: the objects in the files, by their names.

    Attributes:
        named: such as eos_token, by these names.
        listed: the additional ones, by the key that lists them: a list, or an object with names.

    Raises:
        ConfigError: files disagree, or a token is no text.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]]):
        self._folder, self._files = folder, files
        self.named: dict[str, str] = {
            name: token for name in NAMES if (token := self._read(name, _text)) is not None
        }
        self.listed: dict[str, list[str] | dict[str, str]] = {
            key: tokens for key in _LISTS if (tokens := self._read(key, _texts))
        }

    @property
    def texts(self) -> set[str]:
        """All of them."""
        listed = (t.values() if isinstance(t, dict) else t for t in self.listed.values())
        return {*self.named.values(), *(text for texts in listed for text in texts)}

    def _read(self, name: str, read: Any) -> Any:
        """What the files have under a name, in which they must agree."""
        found = {
            file: token
            for file, content in self._files.items()
            if (token := read(self._folder / file, name, content.get(name))) not in (None, [], {})
        }
        described = " and ".join(f"{token!r} in {file}" for file, token in found.items())
        first = next(iter(found.values()), None)
        require(
            all(token == first for token in found.values()),
            f"{self._folder}: {name} is {described}: remove the wrong one",
        )
        return first


def _text(path: Path, name: str, token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
        require_kind(path, name, text, str)
    return text


def _texts(path: Path, name: str, tokens: Any) -> list[str] | dict[str, str]:
    if isinstance(tokens, dict):
        tokens = {key: _text(path, f"{name}.{key}", token) for key, token in tokens.items()}
        return {key: text for key, text in tokens.items() if text is not None}
    require_kind(path, name, tokens or [], list)
    texts = [_text(path, f"each of {name}", token) for token in tokens or []]
    return [text for text in texts if text is not None]


def find_flags(*files: Any) -> dict[str, set[str]]:
    """The flags that are set in the descriptions of tokens in JSON values, by the token's text."""
    found: dict[str, set[str]] = {}
    for token in _find_descriptions(files):
        flags = {flag for flag in _FLAGS if token.get(flag) not in (None, False)}
        if flags:
            found.setdefault(token["content"], set()).update(flags)
    return found


def _find_descriptions(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _find_descriptions(each)
