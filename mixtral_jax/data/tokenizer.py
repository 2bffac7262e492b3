"""Text to ids and back, through a SentencePiece model: one given, Mixtral's own, or one trained
here.

Which text to train on, and where documents begin and end, is for `text` to say.
"""

import functools
import hashlib
import importlib.util
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from mixtral_jax.config import ConfigError, require

_MISTRAL_FILES = {
    "mixtral": "tokenizer.model.v1",
    "mixtral-v3": "mistral_instruct_tokenizer_240323.model.v3",
}

# Training leaves out what is longer than 4192 bytes: 1000 characters are at most 4000.
_CHUNK_CHARACTERS = 1000
_SAMPLE_CHARACTERS = 10_000_000
# Encoding takes about 50 bytes of memory a character: of text in a chunk, and chunks in a call.
_ENCODED_CHARACTERS = 100_000
_ENCODED_CHUNKS = 64
_SPACE = "\u2581"  # Stands for a space in pieces.


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        model: its bytes, as in its file.
        fingerprint: sha256, in hex, of the model's bytes.
        bytes_per_token: int64 [vocab_size], the bytes of UTF-8 text each piece stands for.
        prefix_bytes: those of the pieces of a text beyond the text's own: the space that Mixtral's
            puts before it.

    Raises:
        ValueError: the bytes are no SentencePiece model with a beginning and an end of text.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("not a SentencePiece model") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(
                "the SentencePiece model lacks a beginning (bos) or an end (eos) of text"
            )
        self.bytes_per_token = np.array(
            [self._count_bytes(token) for token in range(self.vocab_size)], np.int64
        )
        self.prefix_bytes = int(self._processor.normalize("a").startswith(_SPACE))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS; `<s>` written in it stays text."""
        return self.encode_all([text])[0].tolist()

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each, int32, on every core; needs no more memory for a long text than for
        many short ones.
        """
        chunks = [list(self._cut(text)) for text in texts]
        heads = self._encode([first for first, *_ in chunks])
        return [
            np.concatenate([head, *self._encode_rest(rest)])
            for head, (_, *rest) in zip(heads, chunks, strict=True)
        ]

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece such as `[INST]`, which no text encodes to;

        None if there is no such piece.
        """
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id, as the model spells it:

        `\u2581` for a space, `<0x0A>` for a byte.
        """
        return [self._processor.id_to_piece(int(token)) for token in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids below `vocab_size`; control ids stand for none."""
        return self._processor.decode([int(token) for token in ids])

    def save(self, path: Path) -> None:
        """Writes the model; whoever reads `path` meanwhile sees the old file or the new, whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not the process id: in containers on one storage it is often the same.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        temporary.write_bytes(self.model)
        temporary.replace(path)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        num_threads = min(len(texts), os.cpu_count() or 1)
        return [
            np.array(ids, np.int32)
            for ids in self._processor.encode(texts, num_threads=num_threads)
        ]

    def _encode_rest(self, chunks: list[str]) -> Iterator[np.ndarray]:
        """Ids of chunks that begin with a character of the one before, without those of that
        character.
        """
        for start in range(0, len(chunks), _ENCODED_CHUNKS):
            group = chunks[start : start + _ENCODED_CHUNKS]
            for chunk, ids in zip(group, self._encode(group), strict=True):
                yield ids[len(self._processor.encode(chunk[0])) :]

    def _cut(self, text: str) -> Iterator[str]:
        """Chunks whose ids, end to end, are those of the text: cut where no piece can span the cut.

        All but the first begin with the character before the cut, which takes up the space that
        SentencePiece puts before a text. Nothing merges across a cut, so what that character
        encodes to is known.
        """
        start = 0
        while len(text) - start > _ENCODED_CHARACTERS and self._keeps_text:
            end = start + _ENCODED_CHARACTERS
            while end < len(text) and text[end - 1 : end + 1].replace(" ", _SPACE) in self._pairs:
                end += 1
            yield text[max(start - 1, 0) : end]
            start = end
        yield text[max(start - 1, 0) :]

    @functools.cached_property
    def _pairs(self) -> set[str]:
        """Neighbouring characters of all pieces."""
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        return {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}

    @functools.cached_property
    def _keeps_text(self) -> bool:
        """Whether the model encodes text as it is, as Mixtral's do; others rewrite characters or
        strip spaces.
        """
        probe = " \ufb01\n\t\uff21  x"
        return self._processor.normalize(probe).endswith(probe.replace(" ", _SPACE))

    def _count_bytes(self, token: int) -> int:
        processor = self._processor
        if processor.is_byte(token):
            return 1
        if processor.is_control(token) or processor.is_unknown(token):
            return 0
        return len(processor.id_to_piece(token).replace(_SPACE, " ").encode())


def load_tokenizer(
    spec: str, texts: Callable[[], Iterable[str]], saved: Path, *, may_save: bool = True
) -> Tokenizer:
    """The tokenizer that `spec`, a value of `data.tokenizer`, names; a copy goes to `saved`.

    Args:
        spec: a `.model` file, `mixtral`, `mixtral-v3`, or `train:N` for one of N pieces made from
            `texts`.
        texts: gives the same texts at every call; called for `train:N` only, unless `saved` exists:
            a run that goes on keeps the tokenizer it began with.
        saved: where a run keeps its tokenizer.
        may_save: False where another process writes `saved`.

    Raises:
        ConfigError: it cannot be had or trained, or `saved` is another one.
    """
    old = _read_model(saved, f"{saved}") if saved.exists() else None
    kind, _, size = spec.partition(":")
    if kind == "train":
        num_pieces = _parse_num_pieces(spec, size)
        tokenizer = old or _train(num_pieces, texts)
        same = tokenizer.vocab_size == num_pieces
    else:
        tokenizer = read_tokenizer(spec)
        same = old is None or old.fingerprint == tokenizer.fingerprint
    require(
        same,
        f"{saved} is another tokenizer than data.tokenizer={spec}: use a new workdir, or delete "
        "that file",
    )
    if old is None and may_save:
        tokenizer.save(saved)
    return tokenizer


def read_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer that there is already: a `.model` file, `mixtral` or `mixtral-v3`.

    Raises:
        ConfigError: it cannot be had.
    """
    file = _find_mistral(spec) if spec in _MISTRAL_FILES else Path(spec).expanduser()
    return _read_model(file, f"data.tokenizer={spec}")


def check_planned_vocabulary(spec: str, vocab_size: int) -> None:
    """`check_vocabulary` of a tokenizer that is still to be trained.

    Raises:
        ConfigError: names both sizes and the fix.
    """
    kind, _, pieces = spec.partition(":")
    require(
        kind != "train" or not pieces.isdecimal() or int(pieces) <= vocab_size,
        f"data.tokenizer={spec} makes more pieces than model.vocab_size={vocab_size} has rows: "
        f"set --config.model.vocab_size={pieces}, or train fewer pieces",
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Makes sure the model has a row for every piece; more rows than pieces are fine.

    Raises:
        ConfigError: names both sizes and the fix.
    """
    pieces = tokenizer.vocab_size
    require(
        pieces <= vocab_size,
        f"the tokenizer has {pieces} pieces but model.vocab_size={vocab_size}: set "
        f"--config.model.vocab_size={pieces}",
    )


def _read_model(file: Path, name: str) -> Tokenizer:
    require(
        file.is_file(),
        f"{name}: no such file; give a SentencePiece .model file, {', '.join(_MISTRAL_FILES)}, or "
        "train:N",
    )
    try:
        return Tokenizer(file.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{name}: {error}; give another .model file, or train:N to train one"
        ) from error


def _find_mistral(spec: str) -> Path:
    package = importlib.util.find_spec("mistral_common")
    folders = package.submodule_search_locations if package else None
    files = [Path(folder) / "data" / _MISTRAL_FILES[spec] for folder in folders or ()]
    require(
        any(file.is_file() for file in files),
        f"data.tokenizer={spec} needs the package mistral-common: pip install "
        "'mixtral_jax[mistral]', "
        "or name a .model file",
    )
    return next(file for file in files if file.is_file())


def _parse_num_pieces(spec: str, size: str) -> int:
    require(
        size.isascii() and size.isdigit() and len(size) <= 9,  # SentencePiece counts in 32 bits.
        f"data.tokenizer={spec}: train:N needs a whole number of at most 9 digits, such as "
        "train:4096",
    )
    return int(size)


def _train(num_pieces: int, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample_chunks(texts),
            model_writer=model,
            vocab_size=num_pieces,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(" Increase")[0]
        raise ConfigError(
            f"data.tokenizer=train:{num_pieces}: {num_pieces} pieces are too few or too many for "
            "this text "
            f"({reason}): choose another N, or give more text"
        ) from error
    return Tokenizer(model.getvalue())


def _sample_chunks(texts: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Chunks of the text, newlines included so that pieces may hold them, spread evenly if there
    are many.
    """
    share = min(1.0, _SAMPLE_CHARACTERS / max(1, sum(map(len, texts()))))
    chunks = (chunk for text in texts() for chunk in _cut_chunks(text))
    for number, chunk in enumerate(chunks):
        if int((number + 1) * share) > int(number * share):
            yield chunk


def _cut_chunks(text: str) -> Iterator[str]:
    """Cuts at the ends of lines where it can."""
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
