"""Adapters alone, in the layouts of PEFT and of mistral-inference.

Both have a tensor of A and of B for each layer and expert, [r, inputs] and [outputs, r]. PEFT's
names are those of transformers 4, where an expert is three linear layers
(`block_sparse_moe.experts.0.w1`). In transformers 5 the experts of a layer are fused, and PEFT
turns these names and tensors into its own as it loads them (its
`utils/transformers_weight_conversion.py`); names of fused parameters (`target_parameters`) would
load there alone, and have one A for `w1` and `w3` together.

Knows adapters by their paths in a model; what they compute is for `finetune`. They are small: each
array of them is whole, for a moment, on the host that reads or writes it.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import P
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mixtral_jax.config import ConfigError, LoRAConfig, build, require
from mixtral_jax.whole_files import whole_file, write_json

Model = TypeVar("Model", bound=nnx.Module)
Program = Literal["peft", "mistral"]

PEFT_CONFIG = "adapter_config.json"
FILES: dict[Program, str] = {"peft": "adapter_model.safetensors", "mistral": "lora.safetensors"}
_LAYERS: dict[Program, str] = {
    "peft": "base_model.model.model.layers.{L}.",
    "mistral": "layers.{L}.",
}
# By which mistral-inference multiplies B A, unless its caller says otherwise: the file cannot.
_MISTRAL_SCALING = 2.0
# What an adapter_config.json may not ask for: adapters of another kind, or of parts that have none
# here.
_NEUTRAL_KEYS = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_parameters",
    "exclude_modules",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A projection's names in a layer, `{E}` for the expert's number;

    `has_heads`: its outputs are rotated in pairs.
    """

    peft: str
    mistral: str
    has_heads: bool = False


_PLACES = {
    "attention.query": _Place("self_attn.q_proj", "attention.wq", has_heads=True),
    "attention.key": _Place("self_attn.k_proj", "attention.wk", has_heads=True),
    "attention.value": _Place("self_attn.v_proj", "attention.wv"),
    "attention.out": _Place("self_attn.o_proj", "attention.wo"),
    "moe.router.gate": _Place("block_sparse_moe.gate", "feed_forward.gate"),
    "moe.experts.gate": _Place("block_sparse_moe.experts.{E}.w1", "feed_forward.experts.{E}.w1"),
    "moe.experts.down": _Place("block_sparse_moe.experts.{E}.w2", "feed_forward.experts.{E}.w2"),
    "moe.experts.up": _Place("block_sparse_moe.experts.{E}.w3", "feed_forward.experts.{E}.w3"),
}
_NAMES_OF_PEFT = {place.peft.rpartition(".")[2]: name for name, place in _PLACES.items()}


def write_peft(folder: Path, model: nnx.Module, lora: LoRAConfig, *, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for the weights that `base` names.

    Every process calls it; one writes. PEFT with transformers 5 loads adapters of `w1` and `w3`
    together or not at all.
    """
    arrays = _on_host(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.scaling * lora.rank,
        "bias": "none",
        "init_lora_weights": True,
        # Of training, and none of PEFT's: with another value it refuses adapters of fused experts.
        "lora_dropout": 0.0,
        "target_modules": [
            _PLACES[name].peft.rpartition(".")[2] for name in _PLACES if (name, "lora_a") in arrays
        ],
    }
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _save("peft", folder, arrays)
        write_json(folder / PEFT_CONFIG, config)


def write_mistral(folder: Path, model: nnx.Module, lora: LoRAConfig, *, dtype: str) -> None:
    """Writes lora.safetensors, all of it in `dtype`, as mistral-inference wants it: that of the
    model it is for.

    Another scaling than 2 goes into B, which rounds it, unless it is a power of two.
    """
    arrays = _on_host(model)
    folded = {
        key: array * (lora.scaling / _MISTRAL_SCALING) if key[1] == "lora_b" else array
        for key, array in arrays.items()
    }
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _save(
            "mistral", folder, {key: array.astype(np.dtype(dtype)) for key, array in folded.items()}
        )


def read_peft_config(folder: Path) -> LoRAConfig:
    """The adapters that a PEFT folder holds.

    Raises:
        ConfigError: they are not of this kind; names each key.
    """
    path = folder / PEFT_CONFIG
    try:
        theirs = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as an adapter config: {error}") from None
    require(isinstance(theirs, dict), f"{path} must hold a JSON object")
    wrong = [f"{key}={theirs[key]!r}" for key in _NEUTRAL_KEYS if theirs.get(key)]
    wrong += [
        f"{key}={theirs.get(key)!r}"
        for key, only in (("peft_type", "LORA"), ("bias", "none"))
        if theirs.get(key, only) != only
    ]
    modules = theirs.get("target_modules")
    if not isinstance(modules, list) or not set(modules) <= _NAMES_OF_PEFT.keys():
        wrong.append(f"target_modules={modules!r}, not a list of {', '.join(_NAMES_OF_PEFT)}")
    require(not wrong, f"{path} is not of adapters that can be loaded: {'; '.join(wrong)}")
    targets = ",".join(name for module, name in _NAMES_OF_PEFT.items() if module in modules)
    ours = {"rank": theirs.get("r"), "alpha": theirs.get("lora_alpha"), "targets": targets}
    return build(LoRAConfig, ours, f"{path}: finetune.lora.")


def read_adapters(folder: Path, model: Model, lora: LoRAConfig) -> Model:
    """The model, or shapes of one with adapters as `lora` says, with those of a folder of either
    layout.

    Raises:
        ConfigError: lists every tensor that is missing, unexpected or of another shape.
    """
    found: list[Program] = [program for program in FILES if (folder / FILES[program]).is_file()]
    require(
        len(found) == 1,
        f"{folder} must hold one of {' and '.join(FILES.values())}, not {len(found)} of them",
    )
    program = found[0]
    scaling = read_peft_config(folder).scaling if program == "peft" else _MISTRAL_SCALING
    path = folder / FILES[program]
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from None
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    leaves, structure = jax.tree.flatten_with_path(adapters)
    shapes = {_key(path): leaf for path, leaf in leaves}
    _check_fit(path, program, tensors, shapes)
    factor = {"lora_a": 1.0, "lora_b": scaling / lora.scaling}
    arrays = [_load(program, tensors, key, leaf, factor[key[1]]) for key, leaf in shapes.items()]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, arrays), rest)


_Key = tuple[str, str]  # a projection, as in `moe.experts.gate`, and a half of its adapter


def _key(path: tuple[Any, ...]) -> _Key:
    *names, half, _ = jax.tree_util.keystr(path[:-1], simple=True, separator="/").split("/")
    return ".".join(names).removeprefix("blocks."), half


def _on_host(model: nnx.Module) -> dict[_Key, np.ndarray]:
    """All adapters of a model, gathered one array after the other."""
    leaves = jax.tree.flatten_with_path(nnx.state(model, nnx.LoRAParam))[0]
    return {_key(path): np.asarray(jax.reshard(leaf, P())) for path, leaf in leaves}


def _save(program: Program, folder: Path, arrays: Mapping[_Key, np.ndarray]) -> None:
    tensors = {
        name: np.ascontiguousarray(_to_tensor(program, key, array[index]))
        for key, array in arrays.items()
        for name, index in _tensors(program, key, array.shape)
    }
    with whole_file(folder / FILES[program]) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _load(
    program: Program, tensors: Mapping[str, np.ndarray], key: _Key, leaf: Any, factor: float
) -> jax.Array:
    array = np.empty(leaf.shape, leaf.dtype)
    for name, index in _tensors(program, key, leaf.shape):
        array[index] = _from_tensor(
            program, key, tensors[name].astype(leaf.dtype) * factor, array[index].shape
        )
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_fit(
    path: Path, program: Program, tensors: Mapping[str, np.ndarray], shapes: Mapping[_Key, Any]
) -> None:
    wanted = {
        name: _to_tensor(program, key, np.empty(leaf.shape[len(index) :], np.bool_)).shape
        for key, leaf in shapes.items()
        for name, index in _tensors(program, key, leaf.shape)
    }
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} is unexpected" for name in tensors if name not in wanted]
    wrong += [
        f"{name} has shape {tensors[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    require(not wrong, f"{path} does not fit the adapters of the model: {'; '.join(wrong)}")


def _tensors(
    program: Program, key: _Key, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that hold an array of adapters: the name of each, and its place in the array."""
    name, half = key
    pattern = _LAYERS[program] + getattr(_PLACES[name], program)
    letters = "LE" if "{E}" in pattern else "L"
    for index in itertools.product(*(range(size) for size in shape[: len(letters)])):
        numbered = pattern.format(**dict(zip(letters, index, strict=True)))
        yield f"{numbered}.{half.replace('_a', '_A').replace('_b', '_B')}.weight", index


def _to_tensor(program: Program, key: _Key, array: np.ndarray) -> np.ndarray:
    """[inputs, r] as [r, inputs], and [r, outputs] as [outputs, r]."""
    if key[1] == "lora_a":
        return array.reshape(-1, array.shape[-1]).T
    if program == "mistral" and _PLACES[key[0]].has_heads:
        # Rotary pairs are (h, h + H/2) here and in PEFT, and (2h, 2h + 1) there.
        array = array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2)
    return array.reshape(len(array), -1).T


def _from_tensor(
    program: Program, key: _Key, tensor: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """The inverse of `_to_tensor`."""
    array = tensor.T
    if key[1] == "lora_b" and program == "mistral" and _PLACES[key[0]].has_heads:
        array = array.reshape(*shape[:-1], -1, 2).swapaxes(-1, -2)
    return array.reshape(shape)
