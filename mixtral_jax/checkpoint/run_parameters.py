"""Opens the model's parameters in a run's checkpoint, without the optimizer's state.

Adapters are merged into the weights that they adapt. `run` restores the whole state onto devices;
this module needs no devices, since tensorstore reads the files that Orbax has written.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.checkpoint.files.stored import Block, StoredArray
from mixtral_jax.checkpoint.files.zarr_chunks import open_chunks
from mixtral_jax.checkpoint.formats.parameters import parameters_of
from mixtral_jax.checkpoint.merged import merge
from mixtral_jax.config import ConfigError, LoRAConfig, ModelConfig, RouterConfig, require

# The parts of a TrainState that may hold a parameter.
_SECTIONS = ("trained", "frozen")
# A projection with an adapter has these in the place of its weight.
_ADAPTED = ("base/weight", "lora_a/weight", "lora_b/weight")
# A chunk of a training run may hold several layers, which are read one after the other.
_CACHE_BYTES = 2**28
_FIX = "use another step, or copy this one again"


def find_steps(checkpoints: Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, oldest first."""
    names = [path.name for path in checkpoints.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def parameter_key(section: str, parameter: str) -> str:
    """The key of a parameter in a checkpoint, in one section of a TrainState."""
    return f"{section}/{parameter}/value"


def open_parameters(
    step: Path, model: ModelConfig, router: RouterConfig, lora: LoRAConfig
) -> dict[str, StoredArray]:
    """The parameters in the checkpoint of one step, by name.

    Args:
        model: the run's config of the model.
        router: the run's config of the router. The two determine which parameters there must be.
        lora: the run's config of adapters; used only if the checkpoint has adapters.

    Raises:
        ConfigError: the folder is not a checkpoint of a run, or is damaged.
    """
    state = step / "state"
    metadata = read_object(state / "_METADATA")
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    try:
        keys = _find_keys(metadata)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{state / '_METADATA'} is damaged: {type(error).__name__}: {error}; {_FIX}"
        ) from None
    names = parameters_of(model, router)
    adapted = {name: _adapted_names(name) for name in names if name not in keys}
    missing = [name for name, parts in adapted.items() if not keys.keys() >= set(parts)]
    require(
        not missing,
        f"{step} is not a checkpoint of the model in config.json: it lacks {', '.join(missing)}; "
        f"{_FIX}",
    )

    def open_array(name: str) -> StoredArray:
        return _open_array(state, keys[name], metadata, context)

    def open_parameter(name: str) -> StoredArray:
        if name in keys:
            return open_array(name)
        base, a, b = map(open_array, adapted[name])
        return merge(base, a, b, lora.scaling)

    return {name: open_parameter(name) for name in names}


def _adapted_names(parameter: str) -> list[str]:
    return [parameter.removesuffix("weight") + part for part in _ADAPTED]


def _find_keys(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the model's arrays in the checkpoint, by their names in the model."""
    entries = metadata["tree_metadata"].values()
    keys = {part["key"] for entry in entries for part in entry["key_metadata"]}
    named = (
        (section, key) for section in _SECTIONS for key in keys if key.startswith(f"{section}/")
    )
    return {key.removeprefix(f"{section}/").removesuffix("/value"): key for section, key in named}


def _open_array(
    state: Path, key: str, metadata: Mapping[str, Any], context: tensorstore.Context
) -> StoredArray:
    folder, name = state.absolute(), f"{state}: {key}"
    uses_ocdbt, uses_zarr3 = metadata.get("use_ocdbt"), metadata.get("use_zarr3")
    if not uses_ocdbt and not uses_zarr3 and (array := open_chunks(folder / key, name)):
        return array
    if uses_ocdbt:
        base = {"driver": "file", "path": f"{folder}/"}
        files = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
    else:
        files = {"driver": "file", "path": f"{folder}/{key}/"}
    spec = {
        "driver": "zarr3" if uses_zarr3 else "zarr",
        "kvstore": files,
        "fill_missing_data_reads": False,  # By default a missing chunk is read as zeros.
    }
    try:
        array = tensorstore.open(spec, context=context, read=True, open=True).result()
    except ValueError as error:
        raise _damaged(name, error) from None
    chunk = tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or array.shape)
    read_into = functools.partial(_read_into, array, name)
    return StoredArray(array.shape, array.dtype.numpy_dtype, chunk, read_into, name)


def _read_into(array: tensorstore.TensorStore, name: str, block: Block, target: np.ndarray) -> None:
    try:
        target[...] = array[block].read().result()
    except ValueError as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: ValueError) -> ConfigError:
    return ConfigError(f"{name} is damaged: {' '.join(str(error).split())[:300]}; {_FIX}")
