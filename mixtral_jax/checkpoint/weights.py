"""`open_weights`: opens the model in a folder, whoever wrote it, and checks it without reading it.

Everything that needs weights starts from here: training, generation, import and export.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoint import run_parameters
from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.foreign_folder import find_file, read_bytes, read_object
from mixtral_jax.checkpoint.files.stored import DTYPES, StoredArray
from mixtral_jax.checkpoint.formats import huggingface, mistral, tied
from mixtral_jax.checkpoint.formats.architecture import Architecture, find_differences
from mixtral_jax.checkpoint.formats.layouts import Layout, find_layout
from mixtral_jax.checkpoint.formats.reading_side_files import SideFileReader
from mixtral_jax.checkpoint.formats.relayout import as_parameters
from mixtral_jax.checkpoint.formats.side_files import SideFiles, open_side_files
from mixtral_jax.checkpoint.formats.weight_files import enter_cache, find_weights
from mixtral_jax.config import (
    ConfigError,
    FinetuneConfig,
    ModelConfig,
    RouterConfig,
    build,
    require,
)
from mixtral_jax.data.tokenizer import Tokenizer, check_vocabulary

_TOKENIZERS = ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3")
# A hostile config can ask for any number of layers and experts; Mixtral 8x22B has 1,739 tensors.
_MAX_TENSORS = 200_000


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that is still on disk.

    Attributes:
        parameters: by our names (`formats.parameters`), each in the dtype in which it is stored.
        tokenizer: None if the folder has none.
        source: which program or run wrote the weights; shown to people.
        record: the JSON record that a run saved beside them; empty for other folders.
        side_files: what other programs do with the model, as its folder says.
        reading_notes: what was left unread in the folder.
    """

    architecture: Architecture
    parameters: Mapping[str, StoredArray]
    tokenizer: Tokenizer | None
    source: str
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    side_files: SideFiles = dataclasses.field(default_factory=SideFiles)
    reading_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know who use the model: what is not followed here, or was missing."""
        told = self.side_files.notes(self.tokenizer)
        return (*self.reading_notes, *self.architecture.notes, *told)

    @property
    def num_parameters(self) -> int:
        """The number of all parameters, counted as single numbers."""
        return sum(math.prod(stored.shape) for stored in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """Size of all parameters in bytes."""
        return sum(stored.nbytes for stored in self.parameters.values())

    def astype(self, dtype: str) -> "Weights":
        """The same weights with all parameters in one dtype."""
        cast = {name: stored.astype(DTYPES[dtype]) for name, stored in self.parameters.items()}
        return dataclasses.replace(
            self, architecture=_with_dtype(self.architecture, dtype), parameters=cast
        )


def open_weights(folder: Path) -> Weights:
    """Opens a run's workdir (its newest checkpoint), one of its steps, or another program's folder.

    Raises:
        ConfigError: the folder has no weights of a Mixtral, or they are damaged or incomplete; says
            what is wrong and where.
    """
    require(folder.is_dir(), f"{folder} is not a folder: name a folder with weights")
    if (folder / "checkpoints").is_dir():
        steps = run_parameters.find_steps(folder / "checkpoints")
        require(
            steps,
            f"{folder} is a run that has not saved a checkpoint yet: wait for its first one, or "
            "name another folder",
        )
        return _open_step(folder, folder / "checkpoints" / str(steps[-1]))
    if (folder / "state" / "_METADATA").is_file():
        return _open_step(folder.absolute().parents[1], folder)
    return _open_foreign(folder)


def _open_step(workdir: Path, step: Path) -> Weights:
    saved = read_object(workdir / "config.json")
    try:
        sections = [saved["model"], saved["router"], saved["train"], saved.get("finetune") or {}]
        are_sections = all(isinstance(section, dict) for section in sections)
        require(are_sections, "model, router, train and finetune must be objects")
        model = build(ModelConfig, saved["model"], "model.")
        router = build(RouterConfig, saved["router"], "router.")
        architecture = Architecture(
            model, router, model.context_length or saved["train"]["sequence_length"]
        )
        finetune = build(FinetuneConfig, sections[-1], "finetune.")
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{workdir / 'config.json'} is not the config of a run: {error}; put back the file "
            "that the run wrote"
        ) from None
    parameters = run_parameters.open_parameters(step, model, router, finetune.lora)
    if finetune.frozen_dtype:
        model = dataclasses.replace(model, param_dtype=finetune.frozen_dtype)
        architecture = dataclasses.replace(architecture, model=model)
    record = read_object(step / "record" / "metadata")
    tokenizer = _read_tokenizer(workdir, model)
    source, side_files = f"step {step.name} of a run", open_side_files(workdir)
    return Weights(architecture, parameters, tokenizer, source, record, side_files)


def _open_foreign(named: Path) -> Weights:
    folder = enter_cache(named)
    notes = [] if folder == named else [f"reads {folder}, a snapshot in a cache"]
    files = find_weights(folder)
    notes += files.notes
    architecture = _read_configs(folder, files.configs)
    layout, tensors = _find_layout(folder, files.tensors), files.tensors
    if architecture.ties_embeddings:
        tensors = tied.add_unembedding(layout, tensors)
        notes.append(tied.NOTE)
    _require_all_tensors(folder, layout, tensors, architecture.model)
    parameters = as_parameters(layout, tensors, architecture.model)
    if architecture.ties_embeddings and len(tensors) == len(files.tensors):
        tied.require_equal(folder, parameters)
    widest = functools.reduce(np.promote_types, (stored.dtype for stored in parameters.values()))
    architecture = _with_dtype(
        dataclasses.replace(architecture, ties_embeddings=False), widest.name
    )
    tokenizer = _read_tokenizer(folder, architecture.model)
    reader = SideFileReader(folder, architecture.model.vocab_size, tokenizer)
    side_files = reader.read()
    return Weights(
        architecture,
        parameters,
        side_files.add_tokens(tokenizer) if tokenizer else None,
        layout.name,
        side_files=side_files,
        reading_notes=(*notes, *reader.notes),
    )


def _read_configs(folder: Path, names: tuple[str, ...]) -> Architecture:
    """The architecture in the first of the configs, after a comparison with the other.

    Raises:
        ConfigError: there is none, it is no Mixtral's, or the two disagree.
    """
    readers = {"config.json": huggingface.read_config, "params.json": mistral.read_params}
    paths = {name: path for name in names if (path := find_file(folder, name))}
    if not paths:
        raise ConfigError(
            f"{folder} has weights, but no {' or '.join(names)}: copy the one that belongs to the "
            "weights"
        )
    first, *others = paths
    architecture = readers[first](paths[first])
    for name in others:
        try:
            other = readers[name](paths[name])
        except ConfigError as error:
            notes = (*architecture.notes, f"{name} is not read: {error}")
            return dataclasses.replace(architecture, notes=notes)
        differing = find_differences(architecture, other)
        require(
            not differing,
            f"{folder}: {first} and {name} are of different models: {', '.join(differing)}; remove "
            "the wrong one",
        )
    return architecture


def _find_layout(folder: Path, tensors: Mapping[str, FileTensor]) -> Layout:
    layout = find_layout(tensors)
    if layout is None:
        named = ", ".join(sorted(tensors)[:3])
        raise ConfigError(
            f"{folder}: its tensors ({named}, ...) have names that no known layout of a Mixtral "
            "has: convert the weights to the names of transformers or Mistral"
        )
    return layout


def _require_all_tensors(
    folder: Path, layout: Layout, tensors: Mapping[str, FileTensor], model: ModelConfig
) -> None:
    """Checks that the tensors are complete, and that nothing is left over."""
    num_wanted = layout.count_tensors(model)
    require(
        num_wanted <= _MAX_TENSORS,
        f"{folder}: its config has {model.num_layers:,} layers of {model.num_experts:,} experts, "
        f"which would be {num_wanted:,} tensors, but there are {len(tensors):,}: use the config "
        "that belongs to the weights",
    )
    wanted = layout.tensors(model)
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [
        f"{name} in {tensors[name].path.name} is unexpected"
        for name in tensors
        if name not in wanted
    ]
    for name in wanted.keys() & tensors.keys():
        found, shape = tensors[name], wanted[name].shape
        if found.shape != shape:
            wrong.append(f"{name} in {found.path.name} has shape {found.shape}, not {shape}")
    require(
        not wrong,
        f"{folder} does not fit its config ({layout.name}): {'; '.join(sorted(wrong))}; use the "
        "config and the weights of one model",
    )


def _read_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer, which several files may hold."""
    found = {path: read_bytes(path) for name in _TOKENIZERS if (path := find_file(folder, name))}
    if not found:
        return None
    path, content = next(iter(found.items()))
    require(
        len(set(found.values())) == 1,
        f"{folder}: {' and '.join(path.name for path in found)} are different tokenizers: remove "
        "the wrong one",
    )
    try:
        tokenizer = Tokenizer(content)
        check_vocabulary(tokenizer, model.vocab_size)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; remove or replace it") from None
    return tokenizer


def _with_dtype(architecture: Architecture, dtype: str) -> Architecture:
    """Sets the dtype of the parameters, and of the arithmetic.

    Parameters in float16 are computed in float32, since the exponents of float16 are too small.
    """
    computed = "float32" if dtype == "float16" else dtype
    model = dataclasses.replace(architecture.model, dtype=computed, param_dtype=dtype)
    return dataclasses.replace(architecture, model=model)
