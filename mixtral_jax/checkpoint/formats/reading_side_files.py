"""Reads what other programs' folders say beside weights and config: see `SideFiles`.

Where two files say the same thing, both are read, and a folder in which they disagree is refused.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import (
    find_file,
    read_object,
    require_kind,
)
from mixtral_jax.checkpoint.formats.config_keys import Settings
from mixtral_jax.checkpoint.formats.reading_templates import read_template
from mixtral_jax.checkpoint.formats.side_files import SideFiles
from mixtral_jax.checkpoint.formats.special_tokens import SpecialTokens, find_flags
from mixtral_jax.checkpoint.formats.tokenizer_json import find_other_steps
from mixtral_jax.checkpoint.formats.tokenizer_keys import SPECIAL_TOKENS, read_settings
from mixtral_jax.config import require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.vocabulary import read_vocabulary

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_ADDED_TOKENS, _TOKENIZER = "added_tokens.json", "tokenizer.json"
# Keys of generation_config.json that are read, or say who wrote it.
_NOT_KEPT = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "_from_model_config",
    "transformers_version",
)
# Special tokens that nobody here uses.
_KEPT_TOKENS = ("cls_token", "sep_token", "mask_token")
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
        vocabulary = read_vocabulary(tokenizer) if tokenizer else None
        self._pieces = [piece.text for piece in vocabulary.pieces] if vocabulary else []
        self._unknown = vocabulary.find("unknown")[0] if vocabulary else None
        self._bos_id = tokenizer.bos_id if tokenizer else None
        self._adds_space = tokenizer is None or tokenizer.prefix_bytes == 1
        self._objects = {
            name: read_object(path) if (path := find_file(folder, name)) else {}
            for name in (
                *(_CONFIG, _GENERATION, _TOKENIZER_CONFIG, _SPECIAL_TOKENS),
                *(_ADDED_TOKENS, _TOKENIZER),
            )
        }
        names = (_SPECIAL_TOKENS, _TOKENIZER_CONFIG)
        self._special = SpecialTokens(folder, {name: self._objects[name] for name in names})
        self.notes: list[str] = []

    def read(self) -> SideFiles:
        """What the files say.

        Raises:
            ConfigError: files disagree, or say what cannot be followed; names file and value.
        """
        if not self._pieces:
            self.notes += [
                f"{name} is not kept, since there is no tokenizer.model: an export has no tokenizer"
                for name in (_TOKENIZER, _ADDED_TOKENS)
                if find_file(self._folder, name)
            ]
        self._check_pieces()
        added = self._read_added_tokens()
        special = self._special.named
        self._check_bos()
        eos_ids = self._read_ids("eos_token_id")
        if (text := special.get("eos_token")) is not None and (self._pieces or text in added):
            eos_ids.append(self._find_id("eos_token", text, added))
        for text in sorted(self._special.texts) if self._pieces else ():
            self._find_id("special token", text, added)
        generation = self._objects[_GENERATION]
        template = read_template(self._folder)
        self.notes += template.notes
        return SideFiles(
            eos_ids=tuple(dict.fromkeys(eos_ids)),
            bos_id=None if self._pieces else self._read_id("bos_token_id"),
            pad_id=self._read_id("pad_token_id"),
            eos_token=special.get("eos_token"),
            pad_token=special.get("pad_token"),
            added_tokens=added,
            generation={key: value for key, value in generation.items() if key not in _NOT_KEPT},
            tokenizer_settings=self._read_settings(),
            chat_template=template.text,
        )

    def _read_settings(self) -> dict[str, Any]:
        """What other programs do with the tokenizer, which an export has again."""
        config, special = self._objects[_TOKENIZER_CONFIG], self._special
        settings = read_settings(
            config,
            adds_space=self._adds_space,
            context_length=self._objects[_CONFIG].get("max_position_embeddings"),
        )
        require(
            not (settings.refused and self._pieces),
            f"{self._folder / _TOKENIZER_CONFIG}: {'; '.join(settings.refused)}, since here "
            "tokenizer.model alone decides which ids a text gets: remove what is wrong if the "
            "model was trained on these ids; otherwise it cannot be used here",
        )
        others = {name: special.named[name] for name in _KEPT_TOKENS if name in special.named}
        others |= special.listed
        unread = [*settings.refused, *settings.unread]
        if not self._pieces:
            unread += [f"{name}={value!r:.60}" for name, value in others.items()]
        if unread:
            self.notes.append(f"{_TOKENIZER_CONFIG}: not read: {', '.join(unread)}")
        self._tell_special_tokens()
        return {**settings.kept, **(others if self._pieces else {})}

    def _tell_special_tokens(self) -> None:
        """Notes what is not followed of special and added tokens."""
        tokens = self._objects[_SPECIAL_TOKENS]
        if unknown := Settings.of(tokens, SPECIAL_TOKENS).find_unknown(SPECIAL_TOKENS):
            self.notes.append(f"{_SPECIAL_TOKENS}: not read: {', '.join(unknown)}")
        added = self._objects[_TOKENIZER].get("added_tokens")
        if flags := find_flags(self._objects[_TOKENIZER_CONFIG], tokens, added):
            described = ", ".join(f"{', '.join(sorted(flags[text]))} of {text!r}" for text in flags)
            self.notes.append(
                f"of special and added tokens, not followed and not exported: {described:.200}; "
                "here no text encodes to them"
            )
        unk = self._special.named.get("unk_token")
        if self._pieces and unk not in (None, self._unknown):
            self.notes.append(
                f"unk_token={unk!r} is not followed: here and in exports it is {self._unknown!r}, "
                "as in tokenizer.model"
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
            are_special[text] = are_special.get(text, False) or is_special is True
        for text, id_ in added.items():
            piece = self._pieces[id_] if id_ < len(self._pieces) else None
            require(
                piece is None or piece == text.replace(" ", "\u2581"),
                f"{self._folder}: the added token {text!r} has the id {id_}, which is {piece!r} in "
                f"tokenizer.model: {_ONE_MODEL}",
            )
        new = {text: id_ for text, id_ in added.items() if id_ >= len(self._pieces)}
        words = [
            text
            for text in new
            if not (are_special[text] or text in self._special.texts or _MARK.fullmatch(text))
        ]
        require(
            not (words and self._pieces),
            f"{self._folder}: the added tokens {', '.join(map(repr, words))} are words that texts "
            "encode to, which tokenizer.model does not know: add them there as user-defined "
            "pieces, or set special to true if they are no words",
        )
        return dict(sorted(new.items(), key=lambda item: item[1]))

    def _list_added_tokens(self) -> Iterator[tuple[str, Any, Any, bool | None]]:
        """Each with its file, its id, its text, and whether it is special, if the file says so."""
        for text, id_ in self._objects[_ADDED_TOKENS].items():
            yield _ADDED_TOKENS, id_, text, None
        described = self._objects[_TOKENIZER_CONFIG].get("added_tokens_decoder") or {}
        require_kind(self._folder / _TOKENIZER_CONFIG, "added_tokens_decoder", described, dict)
        for key, token in described.items():
            require_kind(
                self._folder / _TOKENIZER_CONFIG, f"added_tokens_decoder.{key}", token, dict
            )
            id_ = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
            yield _TOKENIZER_CONFIG, id_, token.get("content"), token.get("special")
        listed = self._objects[_TOKENIZER].get("added_tokens") or []
        require_kind(self._folder / _TOKENIZER, "added_tokens", listed, list)
        for token in listed:
            require_kind(self._folder / _TOKENIZER, "an added token", token, dict)
            yield _TOKENIZER, token.get("id"), token.get("content"), token.get("special")

    def _check_pieces(self) -> None:
        """Makes sure that tokenizer.json is tokenizer.model in another form, with the same ids."""
        other = find_other_steps(self._objects[_TOKENIZER]) if self._pieces else []
        require(
            not other,
            f"{self._folder / _TOKENIZER}: {', '.join(other)} would turn texts into other ids than "
            f"tokenizer.model does: {_ONE_MODEL}",
        )
        model = self._objects[_TOKENIZER].get("model") or {}
        require_kind(self._folder / _TOKENIZER, "model", model, dict)
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
        bos = self._special.named.get("bos_token")
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
