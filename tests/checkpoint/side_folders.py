"""Writes folders of weights with files beside them, for a tokenizer of fewer pieces than ids."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE
from mixtral_jax.data.tokenizer import Tokenizer
from tests.checkpoint.folders import SMALL, random_parameters, tensors_of, write_config
from tests.data.chat_cases import train_tokenizer

NUM_PIECES = 400
# Some ids more than the tokenizer has pieces.
MODEL = dataclasses.replace(SMALL, vocab_size=NUM_PIECES + 12)
END, START = NUM_PIECES, NUM_PIECES + 1
CHATML = {"<|im_end|>": END, "<|im_start|>": START}
Files = Mapping[str, Any]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@functools.cache
def tensors() -> dict[str, Any]:
    return tensors_of(HUGGING_FACE, random_parameters(MODEL), MODEL)


def write(folder: Path, files: Files, **config: Any) -> Path:
    """Writes a folder with these files beside its weights, and changes to its config."""
    write_config(folder, MODEL, **config)
    save_file(tensors(), folder / "model.safetensors")
    tokenizer().save(folder / "tokenizer.model")
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name).write_text(text)
    return folder


def describe(*tokens: tuple[str, int, bool]) -> dict[str, Any]:
    return {str(id_): {"content": text, "special": is_special} for text, id_, is_special in tokens}
