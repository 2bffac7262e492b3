"""Models whose config says that one array is both embedding and unembedding.

Here they are two arrays with equal numbers. Files may have one tensor or both.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.stored import StoredArray
from mixtral_jax.checkpoint.formats.layouts import Layout
from mixtral_jax.config import require

NOTE = (
    "tie_word_embeddings=True: embedding and unembedding are two arrays with equal numbers here, "
    "in exports too, and tuning changes them apart"
)
_EMBEDDING, _UNEMBEDDING = "embedding_VD", "unembed/weight"
_NUM_ROWS_AT_ONCE = 1024


def add_unembedding(layout: Layout, tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """The tensors, with that of the embedding in the place of the unembedding if that is missing.

    Both have the dimensions [V, D] in every layout.
    """
    names = {place.parameter: place.tensor for place in layout.places}
    embedding, unembedding = names[_EMBEDDING], names[_UNEMBEDDING]
    missing = {unembedding: tensors[embedding]} if embedding in tensors else {}
    return missing | dict(tensors)


def require_equal(folder: Path, parameters: Mapping[str, StoredArray]) -> None:
    """Reads both, a few rows at a time, and compares them.

    Raises:
        ConfigError: they differ.
    """
    embedding, unembedding = parameters[_EMBEDDING], parameters[_UNEMBEDDING]
    num_rows, size = embedding.shape
    for start in range(0, num_rows, _NUM_ROWS_AT_ONCE):
        rows, every = slice(start, min(start + _NUM_ROWS_AT_ONCE, num_rows)), slice(0, size)
        ours, theirs = embedding.read((rows, every)), unembedding.read((every, rows)).T
        require(
            np.array_equal(ours.astype(np.float32), theirs.astype(np.float32), equal_nan=True),
            f"{folder}: its config has tie_word_embeddings=True, but the tensors of embedding and "
            f"unembedding differ in rows {rows.start} to {rows.stop - 1}: set it to false to use "
            "both tensors, or remove that of the unembedding",
        )
