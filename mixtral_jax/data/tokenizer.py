"""Text to ids and back, with a SentencePiece model: a given one, Mixtral's own, or a trained one.

`text` chooses the text to train on, and adds BOS and EOS to documents.
"""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from mixtral_jax.config import ConfigError, local_path, require
from mixtral_jax.data.tokenizer_training import train_model
from mixtral_jax.whole_files import write_whole

_MISTRAL_FILES = {
    "mixtral": "tokenizer.model.v1",
    "mixtral-v3": "mistral_instruct_tokenizer_240323.model.v3",
}

# Encoding takes about 50 bytes of memory per character: these two limit it.
_ENCODING_CHUNK_CHARACTERS = 100_000
_MAX_CHUNKS_PER_CALL = 64
_SPACE = "\u2581"  # How pieces spell a space.


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        model: the bytes of its file.
        fingerprint: sha256, in hex, of these bytes.
        bytes_per_token: int64 [vocab_size], the number of bytes of UTF-8 text per piece. An id in a
            text may have more or fewer bytes of the text behind it, unless `spells_text`.
        prefix_bytes: how many bytes the pieces of a text have beyond the text itself: 1 if the
            model, like Mixtral's, adds a space before a text, else 0.
        unused_ids: ids that stand for nothing, and that no text encodes to.

    Raises:
        ValueError: the bytes are not a SentencePiece model with BOS and EOS pieces.
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
                "the SentencePiece model lacks a piece for the beginning (BOS) or end (EOS) of text"
            )
        self.bytes_per_token = np.array(
            [self._count_bytes(token) for token in range(self.vocab_size)], np.int64
        )
        self.unused_ids = tuple(filter(self._processor.is_unused, range(self.vocab_size)))
        self.prefix_bytes = int(self._processor.normalize("a").startswith(_SPACE))

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without BOS and EOS; `<s>` in the text stays text."""
        return self.encode_all([text])[0].tolist()

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Encodes each text, as int32 arrays, on all cores.

        The memory it needs does not grow with the length of a text.
        """
        chunks = [list(self._cut(text)) for text in texts]
        heads = self._encode([first for first, *_ in chunks])
        return [
            np.concatenate([head, *self._encode_rest(rest)])
            for head, (_, *rest) in zip(heads, chunks, strict=True)
        ]

    def count_text_bytes(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The number of UTF-8 bytes of `text` behind each of its `ids`, int64; their sum is that of
        the text. Bytes that the model leaves out count with the id after them, or with the last.
        """
        if not len(ids):
            return np.zeros(0, np.int64)
        if self.spells_text:
            counts = self.bytes_per_token[ids]
            counts[0] -= self.prefix_bytes
            return counts
        spans = self._processor.encode(text, return_type="offset_mapping", return_bytes=True)
        ends = [end for _, end in spans["offsets"][:-1]]
        return np.diff([0, *ends, len(text.encode())])

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece such as `[INST]`, which no text encodes to; None if the model
        has no such piece.
        """
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces of ids in the model's spelling: `\u2581` for a space, `<0x0A>` for a byte."""
        return [self._processor.id_to_piece(int(token)) for token in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids below `vocab_size`; control ids give no text."""
        return self._processor.decode([int(token) for token in ids])

    def save(self, path: Path) -> None:
        """Writes the model to a file, making the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        num_threads = min(len(texts), os.cpu_count() or 1)
        return [
            np.array(ids, np.int32)
            for ids in self._processor.encode(texts, num_threads=num_threads)
        ]

    def _encode_rest(self, chunks: list[str]) -> Iterator[np.ndarray]:
        """Encodes chunks that begin with the last character of the chunk before, and drops the ids
        of that character.
        """
        for start in range(0, len(chunks), _MAX_CHUNKS_PER_CALL):
            group = chunks[start : start + _MAX_CHUNKS_PER_CALL]
            for chunk, ids in zip(group, self._encode(group), strict=True):
                yield ids[len(self._processor.encode(chunk[0])) :]

    def _cut(self, text: str) -> Iterator[str]:
        """Cuts a text into chunks whose ids, concatenated, are those of the text.

        It cuts where no piece can span the cut. Each chunk but the first begins with the character
        before the cut, because SentencePiece adds a space before every text it encodes. Nothing
        merges across a cut, so the ids of that character are known and can be dropped.
        """
        start = 0
        while len(text) - start > _ENCODING_CHUNK_CHARACTERS and self._keeps_text:
            end = start + _ENCODING_CHUNK_CHARACTERS
            while end < len(text) and text[end - 1 : end + 1].replace(" ", _SPACE) in self._pairs:
                end += 1
            yield text[max(start - 1, 0) : end]
            start = end
        yield text[max(start - 1, 0) :]

    @functools.cached_property
    def _pairs(self) -> set[str]:
        """All pairs of neighbouring characters in pieces."""
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        return {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}

    @functools.cached_property
    def spells_text(self) -> bool:
        """True if the pieces of every text have its bytes, as those of Mixtral's tokenizers do: the
        model keeps text, and has a piece for every byte.
        """
        return self._keeps_text and any(map(self._processor.is_byte, range(self.vocab_size)))

    @functools.cached_property
    def _keeps_text(self) -> bool:
        """Whether the model encodes text unchanged, as Mixtral's do; others rewrite characters or
        strip spaces.
        """
        probe = " \ufb01\n\t\uff21  x"
        return self._processor.normalize(probe).endswith(probe.replace(" ", _SPACE))

    def _count_bytes(self, token: int) -> int:
        processor = self._processor
        if processor.is_byte(token):
            return 1
        without_text = (processor.is_control, processor.is_unknown, processor.is_unused)
        if any(is_kind(token) for is_kind in without_text):
            return 0
        return len(processor.id_to_piece(token).replace(_SPACE, " ").encode())


def load_tokenizer(
    spec: str, texts: Callable[[], Iterable[str]], saved: Path, *, may_save: bool = True
) -> Tokenizer:
    """Loads or trains the tokenizer that `data.tokenizer` names, and saves a copy.

    Args:
        spec: the value of `data.tokenizer`: a `.model` file, `mixtral`, `mixtral-v3`, or `train:N`
            to train one with N pieces on `texts`.
        texts: gives the same texts at every call. Called only for `train:N`, and only if `saved`
            does not exist: a resumed run keeps its tokenizer.
        saved: where the run keeps its tokenizer.
        may_save: False if another process writes `saved`.

    Raises:
        ConfigError: it cannot be loaded or trained, or `saved` is a different one.
    """
    old = _read_model(saved, f"{saved}") if saved.exists() else None
    kind, _, size = spec.partition(":")
    if kind == "train":
        num_pieces = _parse_num_pieces(spec, size)
        tokenizer = old or Tokenizer(train_model(num_pieces, texts))
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


def read_tokenizer(
    spec: str, key: str = "data.tokenizer", alternative: str = "name a .model file"
) -> Tokenizer:
    """Reads an existing tokenizer: a `.model` file, `mixtral` or `mixtral-v3`.

    Args:
        key: the key or flag that names the tokenizer, for the message of an error.
        alternative: what the user may do instead of installing Mixtral's tokenizers, for the same.

    Raises:
        ConfigError: it cannot be found or read.
    """
    name = f"{key}={spec}"
    if spec in _MISTRAL_FILES:
        return _read_model(_find_mistral(spec, name, alternative), name)
    return _read_model(local_path(spec, key), name)


def check_planned_vocabulary(spec: str, vocab_size: int) -> None:
    """Does what `check_vocabulary` does, before the tokenizer is trained.

    Raises:
        ConfigError: names both sizes and the fix.
    """
    kind, _, pieces = spec.partition(":")
    require(
        kind != "train" or not pieces.isdecimal() or int(pieces) <= vocab_size,
        f"data.tokenizer={spec} makes more pieces than model.vocab_size={vocab_size} allows: "
        f"set --config.model.vocab_size={pieces}, or train fewer pieces",
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, is_planned: bool = False) -> None:
    """Makes sure that the model has an embedding for every piece; it may have more.

    Args:
        is_planned: the model is still to be made, so its vocabulary may still change.

    Raises:
        ConfigError: names both sizes and the fix.
    """
    pieces = tokenizer.vocab_size
    fix = (
        f"set --config.model.vocab_size={pieces}"
        if is_planned
        else "use the tokenizer that the model was trained with"
    )
    require(
        pieces <= vocab_size,
        f"the tokenizer has {pieces} pieces but model.vocab_size={vocab_size}: {fix}",
    )


def _read_model(file: Path, name: str) -> Tokenizer:
    *others, last = [*_MISTRAL_FILES, *(["train:N"] if name.startswith("data.") else [])]
    problem = "a folder without tokenizer.model" if file.is_dir() else "no such file"
    if (file / "tokenizer.model").is_file():
        problem = "a folder: name the tokenizer.model in it"
    kinds = f"a SentencePiece .model file, {', '.join(others)}, or {last}"
    require(file.is_file(), f"{name}: {problem}; give {kinds}")
    try:
        return Tokenizer(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; give {kinds}") from error


def _find_mistral(spec: str, name: str, alternative: str) -> Path:
    package = importlib.util.find_spec("mistral_common")
    folders = package.submodule_search_locations if package else None
    files = [Path(folder) / "data" / _MISTRAL_FILES[spec] for folder in folders or ()]
    require(
        any(file.is_file() for file in files),
        f"{name} needs the package mistral-common: pip install -e '.[mistral]', or {alternative}",
    )
    return next(file for file in files if file.is_file())


def _parse_num_pieces(spec: str, size: str) -> int:
    require(
        size.isascii() and size.isdigit() and len(size) <= 9,  # SentencePiece counts in 32 bits.
        f"data.tokenizer={spec}: train:N needs a whole number of at most 9 digits, such as "
        "train:4096",
    )
    return int(size)
