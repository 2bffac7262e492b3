"""Writes a model's adapters without the model, for PEFT and for mistral-inference.

Both formats have a tensor A [r, inputs] and a tensor B [outputs, r] for each layer and expert. The
names for PEFT are those of transformers 4, where an expert is three linear layers
(`block_sparse_moe.experts.0.w1`). In transformers 5 the experts of a layer are fused, and PEFT
converts these names and tensors when it loads them (its
`utils/transformers_weight_conversion.py`). Adapters with the names of fused parameters
(`target_parameters`) would load only there, and have one A for `w1` and `w3` together.

Adapters are identified by their paths in the model; `finetune.lora` has what they compute. They are
small, so each array is gathered whole on the host before it is written.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax import P
from safetensors.numpy import save_file

from mixtral_jax.config import LoRAConfig
from mixtral_jax.whole_files import whole_file, write_json

Program = Literal["peft", "mistral"]

PEFT_CONFIG = "adapter_config.json"
FILES: dict[Program, str] = {"peft": "adapter_model.safetensors", "mistral": "lora.safetensors"}
_LAYERS: dict[Program, str] = {
    "peft": "base_model.model.model.layers.{L}.",
    "mistral": "layers.{L}.",
}
# mistral-inference multiplies B A by this unless its caller passes another scaling; the file has no
# place for it.
_MISTRAL_SCALING = 2.0


@dataclasses.dataclass(frozen=True)
class _Place:
    """A projection's names in a layer, where `{E}` stands for the number of the expert.

    `has_heads`: whether its outputs are rotary heads.
    """

    peft: str
    mistral: str
    has_heads: bool = False


# By our names of the projections.
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


def write_peft(folder: Path, model: nnx.Module, lora: LoRAConfig, *, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `base` names the base model.

    Every process calls it, and one writes. PEFT with transformers 5 can load adapters of `w1` and
    `w3` only if there are both.
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
        # Dropout matters only in training, and PEFT refuses a positive value for fused experts.
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
    """Writes lora.safetensors, with all tensors in `dtype`.

    mistral-inference needs `dtype` to be that of the base model. A scaling other than 2 is
    multiplied into B, which is exact if the scaling is a power of two, and rounds otherwise.
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


# The name of a projection, such as `moe.experts.gate`, and which matrix: `lora_a` or `lora_b`.
_Key = tuple[str, str]


def _key(path: tuple[Any, ...]) -> _Key:
    *names, half, _ = jax.tree_util.keystr(path[:-1], simple=True, separator="/").split("/")
    return ".".join(names).removeprefix("blocks."), half


def _on_host(model: nnx.Module) -> dict[_Key, np.ndarray]:
    """All adapters of a model, gathered one array at a time."""
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


def _tensors(
    program: Program, key: _Key, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that hold an array of adapters: the name of each, and its index in the array."""
    name, half = key
    pattern = _LAYERS[program] + getattr(_PLACES[name], program)
    letters = "LE" if "{E}" in pattern else "L"
    for index in itertools.product(*(range(size) for size in shape[: len(letters)])):
        numbered = pattern.format(**dict(zip(letters, index, strict=True)))
        yield f"{numbered}.{half.replace('_a', '_A').replace('_b', '_B')}.weight", index


def _to_tensor(program: Program, key: _Key, array: np.ndarray) -> np.ndarray:
    """Transposes [inputs, r] to [r, inputs], and [r, outputs] to [outputs, r]."""
    if key[1] == "lora_a":
        return array.reshape(-1, array.shape[-1]).T
    if program == "mistral" and _PLACES[key[0]].has_heads:
        # Rotary pairs are (h, h + H/2) in our model and PEFT, and (2h, 2h + 1) in Mistral's.
        array = array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2)
    return array.reshape(len(array), -1).T
