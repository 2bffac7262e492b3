"""Writes folders of weights as other programs do, for small random Mixtrals."""

import collections
import dataclasses
import json
import pickle
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.checkpoint.files.stored import DTYPES, StoredArray
from mixtral_jax.checkpoint.formats import huggingface, mistral
from mixtral_jax.checkpoint.formats.architecture import UNKNOWN_LOSSES, Architecture
from mixtral_jax.checkpoint.formats.layouts import Layout
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS, parameter_chunk, parameter_shape
from mixtral_jax.checkpoint.formats.relayout import as_tensors
from mixtral_jax.checkpoint.weights import Weights
from mixtral_jax.config import ModelConfig
from mixtral_jax.data.tokenizer import Tokenizer

# All dimensions differ, so that a test notices if one is mistaken for another.
SMALL = ModelConfig(
    vocab_size=21,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    num_experts=5,
    rope_theta=5e4,
    norm_eps=1e-6,
    dtype="float32",
)


def architecture_of(model: ModelConfig, chosen: int = 2) -> Architecture:
    """The architecture of a model whose router chooses `chosen` experts per token."""
    router = dataclasses.replace(UNKNOWN_LOSSES, num_experts_per_token=chosen)
    return Architecture(model, router, 64)


def random_parameters(
    model: ModelConfig, dtype: str = "float32", seed: int = 0
) -> dict[str, np.ndarray]:
    """Random numbers for every parameter; no two are equal in float32."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=parameter_shape(name, model)).astype(DTYPES[dtype])
        for name in PARAMETERS
    }


def store_array(array: np.ndarray, name: str = "memory") -> StoredArray:
    """A stored array that is read from memory; its chunk is the whole array."""

    def read_into(block, target):
        target[...] = array[block]

    return StoredArray(array.shape, array.dtype, array.shape, read_into, name)


def in_memory(parameters: Mapping[str, np.ndarray], model: ModelConfig) -> dict[str, StoredArray]:
    """The parameters as stored arrays that are read from memory."""
    return {
        name: dataclasses.replace(store_array(array, name), chunk=parameter_chunk(name, model))
        for name, array in parameters.items()
    }


def random_weights(
    model: ModelConfig, chosen: int, dtype: str, tokenizer: Tokenizer | None = None
) -> Weights:
    """A random model in memory, with `chosen` experts per token."""
    model = dataclasses.replace(model, param_dtype=dtype)
    parameters = in_memory(random_parameters(model, dtype), model)
    return Weights(architecture_of(model, chosen), parameters, tokenizer, "memory")


def assert_same_weights(found: Weights, expected: Weights) -> None:
    """Asserts that all parameters have the same dtypes and bits."""
    theirs = read_all(expected)
    for name, array in read_all(found).items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name


def read_all(weights: Weights) -> dict[str, np.ndarray]:
    """All parameters of weights, read whole."""
    return {name: stored.read(stored.whole) for name, stored in weights.parameters.items()}


def tensors_of(
    layout: Layout, parameters: Mapping[str, np.ndarray], model: ModelConfig
) -> dict[str, np.ndarray]:
    """The tensors of a layout that hold these parameters."""
    stored = as_tensors(layout, in_memory(parameters, model), model)
    return {name: tensor.read(tensor.whole) for name, tensor in stored.items()}


def write_config(folder: Path, model: ModelConfig, chosen: int = 2, **changes: Any) -> None:
    """Writes a config.json; changing a key to None removes it."""
    config = huggingface.make_config(architecture_of(model, chosen), model.dtype)
    config |= {"bos_token_id": 1, "eos_token_id": 2} | changes
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    (folder / "config.json").write_text(json.dumps(kept))


def write_params(folder: Path, model: ModelConfig, chosen: int = 2, **changes: Any) -> None:
    """Writes a params.json; changing a key to None removes it."""
    params = mistral.make_params(architecture_of(model, chosen)) | changes
    (folder / "params.json").write_text(
        json.dumps({key: v for key, v in params.items() if v is not None})
    )


def write_shards(
    folder: Path, stem: str, tensors: Mapping[str, np.ndarray], num_shards: int
) -> dict[str, str]:
    """Writes several safetensors files and their index; returns the index."""
    weight_map = {}
    for number in range(num_shards):
        name = f"{stem}-{number + 1:05}-of-{num_shards:05}.safetensors"
        here = {tensor: tensors[tensor] for tensor in list(tensors)[number::num_shards]}
        save_file(here, folder / name)
        weight_map |= dict.fromkeys(here, name)
    write_index(folder, stem, weight_map)
    return weight_map


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str]) -> None:
    """Writes the index of several safetensors files."""
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}


class _TorchPickler(pickle.Pickler):
    """Pickles arrays as torch.save pickles tensors: a call by name, and a separate storage."""

    def __init__(self, file, storages: list[np.ndarray]):
        super().__init__(file, protocol=2)
        self.storages = storages

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        self.storages.append(obj.array)
        kind = getattr(sys.modules["torch"], _STORAGES[obj.array.dtype.name])
        return ("storage", kind, str(len(self.storages) - 1), "cpu", obj.array.size)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        strides = tuple(stride // obj.itemsize for stride in obj.strides)
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (_Storage(obj), 0, obj.shape, strides, False, collections.OrderedDict())


class _Storage:
    def __init__(self, array: np.ndarray):
        self.array = array.reshape(-1)


def write_torch(path: Path, tensors: Any) -> None:
    """Writes a file as torch.save does, without torch.

    While the file is pickled, modules with torch's names stand in for it.
    """

    def function(*_: Any) -> None:
        raise AssertionError("must not be called")

    modules = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
    for name in _STORAGES.values():
        setattr(modules["torch"], name, type(name, (), {"__module__": "torch"}))
    function.__module__, function.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    modules["torch._utils"]._rebuild_tensor_v2 = function
    hidden = {name: sys.modules[name] for name in modules if name in sys.modules}
    storages: list[np.ndarray] = []
    sys.modules.update(modules)
    try:
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("archive/data.pkl", "w") as file:
                _TorchPickler(file, storages).dump(tensors)
            archive.writestr("archive/byteorder", "little")
            for number, storage in enumerate(storages):
                archive.writestr(f"archive/data/{number}", storage.tobytes())
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)
