"""Writes weights into a folder that other programs load.

The formats are Hugging Face (transformers, vLLM, SGLang) and Mistral (mistral-inference). Tensors
are copied from file to file, a few at a time. A model that the format cannot express is refused
before anything is written.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from mixtral_jax.checkpoint.files.safetensors import FileWriter
from mixtral_jax.checkpoint.files.stored import StoredArray, run_jobs, scratch
from mixtral_jax.checkpoint.formats import huggingface, mistral
from mixtral_jax.checkpoint.formats.architecture import require_mixtral
from mixtral_jax.checkpoint.formats.chat_templates import CHAT_TEMPLATES, find_version
from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE, MISTRAL, Layout
from mixtral_jax.checkpoint.formats.relayout import as_tensors
from mixtral_jax.checkpoint.formats.tokenizer_json import make_tokenizer_config, make_tokenizer_json
from mixtral_jax.checkpoint.model_card import make_model_card
from mixtral_jax.checkpoint.weights import Weights
from mixtral_jax.config import require
from mixtral_jax.data.tokenizer import Tokenizer

Format = Literal["hf", "mistral"]

# Ids in Mixtral's tokenizer, for a model without a tokenizer whose folder names none.
_BOS_ID, _EOS_ID = 1, 2


def _make_hugging_face_files(weights: Weights) -> dict[str, str]:
    tokenizer, architecture, side = weights.tokenizer, weights.architecture, weights.side_files
    if tokenizer is None:
        bos_id, eos_id = _BOS_ID if side.bos_id is None else side.bos_id, _EOS_ID
    else:
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    eos_ids = list(side.eos_ids) or [eos_id]
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0]}
    ids |= {} if side.pad_id is None else {"pad_token_id": side.pad_id}
    files = {
        "config.json": huggingface.make_config(architecture, architecture.model.param_dtype) | ids,
        "generation_config.json": {**side.generation, **ids},
    }
    texts = {"README.md": make_model_card(weights)}
    if tokenizer is not None:
        files["tokenizer.json"] = make_tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = make_tokenizer_config(
            tokenizer,
            side.chat_template or CHAT_TEMPLATES[_choose_version(weights, tokenizer)],
            architecture.context_length,
            eos_token=side.eos_token,
            pad_token=side.pad_token,
            settings=side.tokenizer_settings,
        )
    elif side.chat_template is not None:
        texts["chat_template.jinja"] = side.chat_template
    return {name: _to_json(value) for name, value in files.items()} | texts


def _make_mistral_files(weights: Weights) -> dict[str, str]:
    if tokenizer := weights.tokenizer:
        others = sorted(set(weights.side_files.eos_ids) - {tokenizer.eos_id})
        require(
            not others,
            f"the model ends texts with the ids {', '.join(map(str, others))} too, and "
            f"mistral-inference stops at {tokenizer.eos_id} alone: export with --format=hf",
        )
    return {"params.json": _to_json(mistral.make_params(weights.architecture))}


def _choose_version(weights: Weights, tokenizer: Tokenizer) -> Literal["v1", "v3"]:
    """The version of the chat template: the model's own, or the one that fits its tokenizer."""
    own = weights.side_files.template
    return find_version(tokenizer) if own == "auto" else own


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """How another program wants its folder.

    Attributes:
        stem: the beginning of the names of the weight files.
        make_small_files: gives the contents of all other files except the tokenizer's, by name.
        v3_tokenizer: the name of the file of a v3 tokenizer.
    """

    layout: Layout
    stem: str
    max_shard_bytes: float
    make_small_files: Callable[[Weights], dict[str, str]]
    v3_tokenizer: str


FORMATS: dict[Format, FolderFormat] = {
    "hf": FolderFormat(HUGGING_FACE, "model", 5e9, _make_hugging_face_files, "tokenizer.model"),
    # mistral-inference reads exactly one file of weights. It reads the tokenizer's version from the
    # file name, and assumes v1 if there is none.
    "mistral": FolderFormat(
        MISTRAL, "consolidated", math.inf, _make_mistral_files, "tokenizer.model.v3"
    ),
}


def make_small_files(weights: Weights, format_: Format) -> dict[str, str]:
    """The contents of all files except the weights and tokenizer.model, by file name.

    Raises:
        ConfigError: the format cannot express the model or its tokenizer.
    """
    require_mixtral(weights.architecture)
    return FORMATS[format_].make_small_files(weights)


def require_exportable(weights: Weights, format_: Format) -> None:
    """Finds now, without reading a weight, what `write_folder` would raise at the end of a run.

    Raises:
        ConfigError: the format cannot express the model, its tokenizer or where its texts end.
    """
    make_small_files(weights, format_)
    as_tensors(FORMATS[format_].layout, weights.parameters, weights.architecture.model)


def find_lost(weights: Weights, format_: Format) -> tuple[str, ...]:
    """A note on what the model came with, if anything, and the format has no place for."""
    if format_ == "hf":
        return ()
    side = weights.side_files
    lost = [*side.defaults, *(side.described_settings if weights.tokenizer else ())]
    padding = {"pad_token_id": side.pad_id, "pad_token": side.pad_token}
    lost += [f"{key}={value}" for key, value in padding.items() if value is not None]
    if weights.tokenizer is None and side.eos_ids:  # With one, other ends than its own are refused.
        lost.append(f"eos_token_id={list(side.eos_ids)}")
    if side.chat_template is not None and side.template == "auto":
        lost.append("the chat template")
    named = ", ".join(lost)
    return (f"not exported, since Mistral's format has no place for it: {named}",) if lost else ()


def write_folder(
    weights: Weights, folder: Path, format_: Format, report: Callable[[int], None]
) -> None:
    """Writes the model into an existing folder; calls `report` with the size of each tensor.

    Raises:
        ConfigError: the format cannot express the model, in which case nothing is written; or a
            file of the source is damaged.
        OSError: a file cannot be written.
    """
    target = FORMATS[format_]
    small_files = make_small_files(weights, format_)
    tensors = as_tensors(target.layout, weights.parameters, weights.architecture.model)
    shards = _cut_into_shards(tensors, target.max_shard_bytes)
    names = [
        f"{target.stem}-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = [f"{target.stem}.safetensors"]
    else:
        index = _make_index(dict(zip(names, shards, strict=True)), weights)
        small_files[f"{target.stem}.safetensors.index.json"] = _to_json(index)
    for name, text in small_files.items():
        # Lone surrogates in another program's text, which UTF-8 has not, are escaped as in JSON.
        (folder / name).write_bytes(text.encode(errors="backslashreplace"))
    if weights.tokenizer is not None:
        is_v3 = _choose_version(weights, weights.tokenizer) == "v3"
        weights.tokenizer.save(folder / (target.v3_tokenizer if is_v3 else "tokenizer.model"))
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, report)


def _cut_into_shards(
    tensors: Mapping[str, StoredArray], max_bytes: float
) -> list[dict[str, StoredArray]]:
    shards: list[dict[str, StoredArray]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > max_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    return shards


def _make_index(
    shards: Mapping[str, Mapping[str, StoredArray]], weights: Weights
) -> dict[str, Any]:
    return {
        "metadata": {"total_parameters": weights.num_parameters, "total_size": weights.nbytes},
        "weight_map": {tensor: name for name, shard in shards.items() for tensor in shard},
    }


def _write_shard(
    path: Path, tensors: Mapping[str, StoredArray], report: Callable[[int], None]
) -> None:
    with contextlib.closing(FileWriter(path, tensors)) as writer:
        for num_bytes in run_jobs(
            functools.partial(_copy, writer, name, tensors[name]) for name in tensors
        ):
            report(num_bytes)


def _copy(writer: FileWriter, name: str, tensor: StoredArray) -> int:
    numbers = scratch("tensor", tensor.shape, tensor.dtype)
    tensor.read_into(tensor.whole, numbers)
    writer.write(name, numbers)
    return tensor.nbytes


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
