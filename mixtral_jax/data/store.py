"""Token stores: tokenised documents in files, written once from end to end and read from anywhere.

Which documents go into which store, and where stores lie, is for `text` to say.
"""

import array
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokenised documents, end to end: each is BOS, its ids, EOS.

    Attributes:
        tokens: uint16 or uint32 [num_tokens], read from disk as needed.
        offsets: int64 [num_documents + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        fingerprint: sha256, in hex, of the tokens and the lengths.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str


class StoreWriter:
    """Writes a token store, document by document; leaving the context completes it."""

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir()
        self._folder = folder
        self._dtype = dtype
        self._file = (folder / "tokens").open("wb")
        self._lengths = array.array("q")
        self._digest = hashlib.sha256()

    def __enter__(self) -> "StoreWriter":
        return self

    def add(self, ids: np.ndarray) -> None:
        """Appends a document, BOS and EOS included."""
        tokens = ids.astype(self._dtype).tobytes()
        self._file.write(tokens)
        self._digest.update(tokens)
        self._lengths.append(len(ids))

    def __exit__(self, *error: object) -> None:
        self._file.close()
        lengths = np.array(self._lengths, np.int64)
        self._digest.update(lengths.tobytes())
        np.save(self._folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        summary = {"dtype": self._dtype.name, "fingerprint": self._digest.hexdigest()}
        (self._folder / "summary.json").write_text(json.dumps(summary))


def open_store(folder: Path) -> TokenStore:
    """The store that lies in `folder`.

    Raises:
        ValueError, EOFError, OSError: a file is missing, or not whole.
    """
    summary = json.loads((folder / "summary.json").read_text())
    offsets = np.load(folder / "offsets.npy")
    file = folder / "tokens"
    size, expected = file.stat().st_size, int(offsets[-1]) * np.dtype(summary["dtype"]).itemsize
    if size != expected:
        raise ValueError(f"{file} holds {size} bytes instead of {expected}")
    return TokenStore(np.memmap(file, summary["dtype"], mode="r"), offsets, summary["fingerprint"])


def flush_to_disk(folder: Path) -> None:
    """Returns when all files in and below `folder` are on the disk: a rename may get there before what it names."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
