"""Reads what other programs' folders say beside weights and config: see `SideFiles`.

Where two files say the same thing, both are read, and a folder in which they disagree is refused.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import find_file, read_bytes, read_object
from mixtral_jax.checkpoint.formats.side_files import SideFiles
from mixtral_jax.config import ConfigError, require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.vocabulary import read_vocabulary

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_ADDED_TOKENS, _TOKENIZER = "added_tokens.json", "tokenizer.json"
_TEKKEN = "tekken.json"
_TEMPLATE, _TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
# Keys of generation_config.json that are read, or say who wrote it.
_NOT_KEPT = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "_from_model_config",
    "transformers_version",
)
# An added token with such a name is a mark, and no word of a text.
_MARK = re.compile(r"<.*>|\[.*\]")
_ONE_MODEL = "use the files of one model"


class SideFileReader:
    """Reads the side files of one folder.

    Args:
        vocab_size: the number of ids of the model.
        tokenizer: that of the folder's tokenizer.model, if it has one.

    Attributes:
        notes: what is not followed and not kept.
    """

    def __init__(self, folder: Path, vocab_size: int, tokenizer: Tokenizer | None):
        self._folder = folder
        self._vocab_size = vocab_size
        self._pieces = [p.text for p in read_vocabulary(tokenizer).pieces] if tokenizer else []
        self._bos_id = tokenizer.bos_id if tokenizer else None
        self._objects = {
            name: read_object(path) if (path := find_file(folder, name)) else {}
            for name in (
                *(_CONFIG, _GENERATION, _TOKENIZER_CONFIG, _SPECIAL_TOKENS),
                *(_ADDED_TOKENS, _TOKENIZER, _TEMPLATE_JSON),
            )
        }
        self.notes: list[str] = []

    def read(self) -> SideFiles:
        """What the files say.

        Raises:
            ConfigError: files disagree, or say what cannot be followed; names file and value.
        """
        if not self._pieces:
            self.notes += [
                f"{name} is not kept, since there is no tokenizer.model: an export has no tokenizer"
                for name in (_TOKENIZER, _ADDED_TOKENS, _TEKKEN)
                if find_file(self._folder, name)
            ]
        self._check_pieces()
        added = self._read_added_tokens()
        special = {name: self._read_special(name) for name in ("eos_token", "pad_token")}
        self._check_bos()
        eos_ids = self._read_ids("eos_token_id")
        if (text := special["eos_token"]) is not None and (self._pieces or text in added):
            eos_ids.append(self._find_id("eos_token", text, added))
        if (text := special["pad_token"]) is not None and self._pieces:
            self._find_id("pad_token", text, added)
        generation = self._objects[_GENERATION]
        return SideFiles(
            eos_ids=tuple(dict.fromkeys(eos_ids)),
            bos_id=None if self._pieces else self._read_id("bos_token_id"),
            pad_id=self._read_id("pad_token_id"),
            **special,
            added_tokens=added,
            generation={key: value for key, value in generation.items() if key not in _NOT_KEPT},
            chat_template=self._read_template(),
        )

    def _read_ids(self, key: str) -> list[int]:
        """The ids that `key` has in the configs: a number or a list in each."""
        found: list[int] = []
        for name in (_CONFIG, _GENERATION):
            value = self._objects[name].get(key)
            ids = [] if value is None else value if isinstance(value, list) else [value]
            for id_ in ids:
                # Some programs write -1 where there is no padding.
                if key != "pad_token_id" or id_ != -1:
                    self._require_id(name, key, id_)
                    found.append(id_)
        return found

    def _read_id(self, key: str) -> int | None:
        """The one id that `key` has in the configs; of several the first."""
        first, *others = dict.fromkeys(self._read_ids(key)) or (None,)
        if others:
            self.notes.append(f"{key} is {[first, *others]} in its files: an export has the first")
        return first

    def _require_id(self, name: str, what: str, id_: Any) -> None:
        require(
            type(id_) is int and 0 <= id_ < self._vocab_size,
            f"{self._folder / name}: {what} has the id {id_!r}, and the ids of the model are 0 to "
            f"{self._vocab_size - 1}: {_ONE_MODEL}",
        )

    def _read_added_tokens(self) -> dict[str, int]:
        """The tokens that tokenizer.model does not have, in the order of their ids."""
        added: dict[str, int] = {}
        origins: dict[int, tuple[str, str]] = {}
        are_special: dict[str, bool] = {}
        for name, id_, text, is_special in self._list_added_tokens():
            require(
                isinstance(text, str) and text != "",
                f"{self._folder / name}: the added token with id {id_!r} is {text!r}, which must "
                "be a text: copy the file again",
            )
            self._require_id(name, f"the added token {text!r}", id_)
            earlier, origin = origins.setdefault(id_, (text, name))
            require(
                earlier == text and added.setdefault(text, id_) == id_,
                f"{self._folder}: {name} has the added token {text!r} with id {id_}, and {origin} "
                f"has {earlier!r} with id {added.get(earlier, id_)}: {_ONE_MODEL}",
            )
            are_special[text] = are_special.get(text, False) or is_special is not False
        for text, id_ in added.items():
            piece = self._pieces[id_] if id_ < len(self._pieces) else None
            require(
                piece is None or piece == text.replace(" ", "\u2581"),
                f"{self._folder}: the added token {text!r} has the id {id_}, which is {piece!r} in "
                f"tokenizer.model: {_ONE_MODEL}",
            )
        new = {text: id_ for text, id_ in added.items() if id_ >= len(self._pieces)}
        words = [text for text in new if not (are_special[text] or _MARK.fullmatch(text))]
        require(
            not (words and self._pieces),
            f"{self._folder}: the added tokens {', '.join(map(repr, words))} are words that texts "
            "encode to, which tokenizer.model does not know: add them there as user-defined pieces",
        )
        return dict(sorted(new.items(), key=lambda item: item[1]))

    def _list_added_tokens(self) -> Iterator[tuple[str, Any, Any, bool | None]]:
        """Each with its file, its id, its text, and whether it is special, if the file says so."""
        for text, id_ in self._objects[_ADDED_TOKENS].items():
            yield _ADDED_TOKENS, id_, text, None
        described = self._objects[_TOKENIZER_CONFIG].get("added_tokens_decoder") or {}
        self._require_kind(_TOKENIZER_CONFIG, "added_tokens_decoder", described, dict)
        for key, token in described.items():
            self._require_kind(_TOKENIZER_CONFIG, f"added_tokens_decoder.{key}", token, dict)
            id_ = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
            yield _TOKENIZER_CONFIG, id_, token.get("content"), token.get("special")
        listed = self._objects[_TOKENIZER].get("added_tokens") or []
        self._require_kind(_TOKENIZER, "added_tokens", listed, list)
        for token in listed:
            self._require_kind(_TOKENIZER, "an added token", token, dict)
            yield _TOKENIZER, token.get("id"), token.get("content"), token.get("special")

    def _check_pieces(self) -> None:
        """Makes sure that tokenizer.json has the pieces of tokenizer.model, with the same ids."""
        model = self._objects[_TOKENIZER].get("model") or {}
        self._require_kind(_TOKENIZER, "model", model, dict)
        vocabulary = model.get("vocab") or {}
        if not isinstance(vocabulary, Mapping):
            return
        differing = [
            f"{text!r} has the id {vocabulary[text]!r} there and {id_} in tokenizer.model"
            for id_, text in enumerate(self._pieces)
            if text in vocabulary and vocabulary[text] != id_
        ]
        require(
            not differing,
            f"{self._folder / _TOKENIZER}: {len(differing):,} pieces differ from tokenizer.model, "
            f"such as {''.join(differing[:1])}: {_ONE_MODEL}",
        )

    def _read_special(self, name: str) -> str | None:
        """A special token, such as eos_token, of the two files that may have it."""
        found: dict[str, str] = {}
        for file in (_SPECIAL_TOKENS, _TOKENIZER_CONFIG):
            token = self._objects[file].get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None:
                self._require_kind(file, name, text, str)
                found[file] = text
        described = " and ".join(f"{text!r} in {file}" for file, text in found.items())
        require(
            len(set(found.values())) <= 1,
            f"{self._folder}: {name} is {described}: remove the wrong one",
        )
        return next(iter(found.values()), None)

    def _find_id(self, name: str, text: str, added: Mapping[str, int]) -> int:
        if text in added:
            return added[text]
        require(
            text in self._pieces,
            f"{self._folder}: its {name} {text!r} is no piece of tokenizer.model and no added "
            f"token: {_ONE_MODEL}",
        )
        return self._pieces.index(text)

    def _check_bos(self) -> None:
        """Makes sure that a text begins as it does here: with BOS of tokenizer.model."""
        bos = self._read_special("bos_token")
        if self._bos_id is not None:
            ours = self._pieces[self._bos_id]
            require(
                bos is None or bos == ours,
                f"{self._folder}: its bos_token is {bos!r}, and that of tokenizer.model is "
                f"{ours!r}, with which texts begin here: {_ONE_MODEL}",
            )
            for id_ in self._read_ids("bos_token_id"):
                if id_ != self._bos_id:
                    self.notes.append(
                        f"bos_token_id={id_} is not followed: texts begin with {ours!r}, id "
                        f"{self._bos_id}, here and in exports"
                    )
        config = self._objects[_TOKENIZER_CONFIG]
        for key, ours in (("add_bos_token", True), ("add_eos_token", False)):
            if config.get(key, ours) != ours:
                self.notes.append(
                    f"{_TOKENIZER_CONFIG}: {key}={config[key]!r} is not followed: texts begin with "
                    "BOS here and in exports, and no prompt ends with EOS"
                )

    def _read_template(self) -> str | None:
        """The chat template, of three files that may have it."""
        found: dict[str, str] = {}
        for file in (_TOKENIZER_CONFIG, _TEMPLATE_JSON):
            template = self._objects[file].get("chat_template")
            if isinstance(template, list):
                template = self._choose_template(file, template)
            if template is not None:
                self._require_kind(file, "chat_template", template, str)
                found[file] = template
        if path := find_file(self._folder, _TEMPLATE):
            try:
                found[_TEMPLATE] = read_bytes(path).decode()
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8 ({error}): copy it again") from None
        require(
            len({template.strip() for template in found.values()}) <= 1,
            f"{self._folder}: the chat templates in {' and '.join(found)} differ: remove the wrong "
            "one",
        )
        return next(iter(found.values()), None)

    def _choose_template(self, file: str, templates: list[Any]) -> Any:
        """The template that is named default, of a list of named ones."""
        for template in templates:
            self._require_kind(file, "each entry of chat_template", template, dict)
        named = {str(template.get("name")): template.get("template") for template in templates}
        if others := named.keys() - {"default"}:
            self.notes.append(
                f"{file}: the chat templates {', '.join(sorted(others))} are not read and not kept "
                "for exports; only the one that is named default is"
            )
        return named.get("default")

    def _require_kind(self, file: str, what: str, value: Any, kind: type) -> None:
        names = {dict: "an object", list: "a list", str: "a text"}
        require(
            isinstance(value, kind),
            f"{self._folder / file}: {what} must be {names[kind]}, not {value!r:.60}: copy the "
            "file again",
        )
