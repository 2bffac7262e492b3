"""`open_weights`: opens the model in a folder, whoever wrote it, and checks it without reading it.

Everything that needs weights starts from here: training, generation, import and export.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoint import run_parameters
from mixtral_jax.checkpoint.files import safetensors, torch_pickle
from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.foreign_folder import find_file, read_bytes, read_object
from mixtral_jax.checkpoint.files.stored import DTYPES, StoredArray
from mixtral_jax.checkpoint.formats import huggingface, mistral
from mixtral_jax.checkpoint.formats.architecture import Architecture
from mixtral_jax.checkpoint.formats.layouts import Layout, find_layout
from mixtral_jax.checkpoint.formats.relayout import as_parameters
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
_HUGGING_FACE_FILE, _MISTRAL_FILE = "model.safetensors", "consolidated.safetensors"
_INDEX_SUFFIX = ".index.json"
_OTHER_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICKLE = re.compile(r"consolidated\.(\d\d)\.(pt|pth)")
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
    """

    architecture: Architecture
    parameters: Mapping[str, StoredArray]
    tokenizer: Tokenizer | None
    source: str
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
    return Weights(architecture, parameters, tokenizer, f"step {step.name} of a run", record)


def _open_foreign(folder: Path) -> Weights:
    tensors = _open_hugging_face(folder)
    configs = {"config.json": huggingface.read_config, "params.json": mistral.read_params}
    if tensors is None:
        tensors = _open_mistral(folder)
        configs = dict(reversed(configs.items()))
    for name, read in configs.items():
        if path := find_file(folder, name):
            architecture = read(path)
            break
    else:
        raise ConfigError(
            f"{folder} has weights, but no {' or '.join(configs)}: copy the one that belongs to "
            "the weights"
        )
    layout = _require_all_tensors(folder, tensors, architecture.model)
    parameters = as_parameters(layout, tensors, architecture.model)
    widest = functools.reduce(np.promote_types, (stored.dtype for stored in parameters.values()))
    architecture = _with_dtype(architecture, widest.name)
    return Weights(
        architecture, parameters, _read_tokenizer(folder, architecture.model), layout.name
    )


def _open_hugging_face(folder: Path) -> dict[str, FileTensor] | None:
    return _open_safetensors(folder, _HUGGING_FACE_FILE)


def _open_mistral(folder: Path) -> dict[str, FileTensor]:
    tensors = _open_safetensors(folder, _MISTRAL_FILE)
    pickles = sorted(path.name for path in folder.iterdir() if _PICKLE.fullmatch(path.name))
    if tensors is None and not pickles:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_PICKLES)
        fix = "name another folder, or copy the weights there"
        if others:
            fix = f"{', '.join(others)} may run code when read, so save the weights as safetensors"
        raise ConfigError(
            f"{folder} has no weights: no {_HUGGING_FACE_FILE}, no consolidated.* and no index; "
            f"{fix}"
        )
    require(
        tensors is None or not pickles,
        f"{folder} has both {_MISTRAL_FILE} and {', '.join(pickles)}: remove the one that you do "
        "not need",
    )
    if tensors is not None:
        return tensors
    numbers = [int(name.split(".")[1]) for name in pickles]
    require(
        numbers == list(range(len(numbers))),
        f"{folder} has {', '.join(pickles)}, which must be numbered from 00 without gaps: one is "
        "missing, or there is both a .pt and a .pth",
    )
    tensors = {}
    for name in pickles:
        path = find_file(folder, name)
        assert path is not None
        found = torch_pickle.open_file(path)
        repeated = sorted(tensors.keys() & found.keys())
        require(
            not repeated,
            f"{path}: {', '.join(repeated)} is in another file too: keep the files of one model",
        )
        tensors |= found
    return tensors


def _open_safetensors(folder: Path, name: str) -> dict[str, FileTensor] | None:
    """The tensors of one file or, if it does not exist, of the files in an index."""
    if path := find_file(folder, name):
        return safetensors.open_file(path)
    if index := find_file(folder, name + _INDEX_SUFFIX):
        return safetensors.open_shards(folder, index)
    return None


def _require_all_tensors(
    folder: Path, tensors: Mapping[str, FileTensor], model: ModelConfig
) -> Layout:
    """The layout of the tensors, after a check that they are complete and nothing is left over."""
    layout = find_layout(tensors)
    if layout is None:
        named = ", ".join(sorted(tensors)[:3])
        raise ConfigError(
            f"{folder}: its tensors ({named}, ...) have names that no known layout of a Mixtral "
            "has: convert the weights to the names of transformers or Mistral"
        )
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
    return layout


def _read_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer | None:
    for name in _TOKENIZERS:
        if path := find_file(folder, name):
            try:
                tokenizer = Tokenizer(read_bytes(path))
                check_vocabulary(tokenizer, model.vocab_size)
            except ValueError as error:
                raise ConfigError(f"{path}: {error}; remove or replace it") from None
            return tokenizer
    return None


def _with_dtype(architecture: Architecture, dtype: str) -> Architecture:
    """Sets the dtype of the parameters, and of the arithmetic.

    Parameters in float16 are computed in float32, since the exponents of float16 are too small.
    """
    computed = "float32" if dtype == "float16" else dtype
    model = dataclasses.replace(architecture.model, dtype=computed, param_dtype=dtype)
    return dataclasses.replace(architecture, model=model)
