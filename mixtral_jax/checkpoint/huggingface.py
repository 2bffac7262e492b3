"""Hugging Face folders: a Mixtral's config and weights as transformers saves them.

One table, `LAYOUTS`, says which tensors hold which parameter; the code below only follows it, so that
it can be followed in the other direction too. Reads the layout that transformers writes, a tensor per
expert, from one file. Leaves tokenizers and the model's code to others, and knows no torch.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mixtral_jax.config import ConfigError, ModelConfig, RouterConfig, require
from mixtral_jax.config_mapping import build

Model = TypeVar("Model")

WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a parameter lies in a Hugging Face checkpoint.

    Dimensions are letters (the key is in `mixtral_jax.model`). Those in braces in `tensor` have a
    tensor for each index; `stored` has the others as that tensor has them, letters that are flattened
    into one dimension written together. "NH D" of an "LDNH" is thus a transposed [N * H, D].
    """

    parameter: str
    dimensions: str
    tensor: str
    stored: str

    @property
    def stacked(self) -> str:
        """The leading dimensions of the parameter, which have a tensor for each index."""
        return "".join(dimension for dimension in self.dimensions if f"{{{dimension}}}" in self.tensor)

    def name(self, indices: tuple[int, ...]) -> str:
        """Name of the tensor at these indices of the stacked dimensions."""
        return self.tensor.format(**dict(zip(self.stacked, indices, strict=True)))

    def tensor_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all the tensors that hold a parameter of this shape."""
        sizes = dict(zip(self.dimensions, shape, strict=True))
        stored = tuple(math.prod(sizes[letter] for letter in letters) for letters in self.stored.split())
        places = itertools.product(*(range(sizes[dimension]) for dimension in self.stacked))
        return {self.name(indices): stored for indices in places}


_LAYER = "model.layers.{L}."
_EXPERT = _LAYER + "block_sparse_moe.experts.{E}."

# Rotary pairs are (h, h + H/2) on both sides, so that no row of a projection moves.
LAYOUTS = (
    Layout("embedding_VD", "VD", "model.embed_tokens.weight", "V D"),
    Layout("blocks/attention_norm/scale", "LD", _LAYER + "input_layernorm.weight", "D"),
    Layout("blocks/attention/query/weight", "LDNH", _LAYER + "self_attn.q_proj.weight", "NH D"),
    Layout("blocks/attention/key/weight", "LDKH", _LAYER + "self_attn.k_proj.weight", "KH D"),
    Layout("blocks/attention/value/weight", "LDKH", _LAYER + "self_attn.v_proj.weight", "KH D"),
    Layout("blocks/attention/out/weight", "LNHD", _LAYER + "self_attn.o_proj.weight", "D NH"),
    Layout("blocks/moe_norm/scale", "LD", _LAYER + "post_attention_layernorm.weight", "D"),
    Layout("blocks/moe/router/gate/weight", "LDE", _LAYER + "block_sparse_moe.gate.weight", "E D"),
    Layout("blocks/moe/experts/gate/weight", "LEDF", _EXPERT + "w1.weight", "F D"),
    Layout("blocks/moe/experts/down/weight", "LEFD", _EXPERT + "w2.weight", "D F"),
    Layout("blocks/moe/experts/up/weight", "LEDF", _EXPERT + "w3.weight", "F D"),
    Layout("norm/scale", "D", "model.norm.weight", "D"),
    Layout("unembed/weight", "DV", "lm_head.weight", "V D"),
)

# Their key -> ours.
_MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_local_experts": "num_experts",
}
# What a Mixtral has no choice in: any other value describes another model.
_FIXED_KEYS = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


@dataclasses.dataclass(frozen=True)
class HuggingFaceConfig:
    """A checkpoint's model, in the dtype it is stored in, and its router, with the loss it was trained with."""

    model: ModelConfig
    router: RouterConfig


def read_config(folder: Path) -> HuggingFaceConfig:
    """Reads config.json, in the spelling of transformers 4 or 5.

    Raises:
        ConfigError: no config there, keys are missing, or it is of a model that this is not; names each key.
    """
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a Hugging Face config: {error}") from None
    require(isinstance(theirs, dict), f"{path} must hold a JSON object")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    wrong = [f"{key} is missing" for key in (*_MODEL_KEYS, "num_experts_per_tok") if theirs.get(key) is None]
    for key, only in _FIXED_KEYS.items():
        if theirs.get(key, only) != only:
            wrong.append(f"{key}={theirs[key]!r} must be {only!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        wrong.append(f"rope_type={rope_type!r} must be 'default'")
    require(not wrong, f"{path} is not of a Mixtral that can be loaded: {'; '.join(wrong)}")
    try:
        return HuggingFaceConfig(_model_config(theirs, rope), _router_config(theirs))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _model_config(theirs: Mapping[str, Any], rope: Mapping[str, Any]) -> ModelConfig:
    dtype = _DTYPES.get(theirs.get("dtype") or theirs.get("torch_dtype") or "float32", "float32")
    ours = {name: theirs[key] for key, name in _MODEL_KEYS.items()}
    ours |= {
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"],
        "rope_theta": rope.get("rope_theta") or theirs.get("rope_theta") or 1e6,
        "norm_eps": theirs.get("rms_norm_eps", 1e-5),
        "initializer_range": theirs.get("initializer_range", 0.02),
        "dtype": dtype,
        "param_dtype": dtype,
    }
    return build(ModelConfig, ours, "model.")


def _router_config(theirs: Mapping[str, Any]) -> RouterConfig:
    # transformers adds the loss only when asked for router logits; the coefficient says what was meant.
    balance = {"weight": theirs.get("router_aux_loss_coef", 0.001), "normalization": "hf"}
    ours = {"num_experts_per_token": theirs["num_experts_per_tok"], "load_balance": balance, "z_loss_weight": 0.0}
    return build(RouterConfig, ours, "router.")


def load_weights(folder: Path, shapes: Model) -> Model:
    """The model of `shapes` (`jax.eval_shape` of its maker, on the mesh in force) with the folder's weights.

    Each device reads the part that it holds and no more, cast to the parameter's dtype.

    Raises:
        ConfigError: lists every tensor that is missing, unexpected or of another shape, before any is read.
    """
    leaves, structure = jax.tree.flatten_with_path(shapes)
    parameters = {_parameter_name(path): leaf for path, leaf in leaves}
    layouts = {layout.parameter: layout for layout in LAYOUTS}
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            wrong = list(_mismatches(file, parameters, layouts))
            require(not wrong, f"{path} does not fit the model: {'; '.join(wrong)}")
            arrays = [_load_parameter(file, layouts[name], leaf) for name, leaf in parameters.items()]
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from None
    return jax.tree.unflatten(structure, arrays)


def _parameter_name(path: tuple[Any, ...]) -> str:
    # The last key is the array within its variable.
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _mismatches(file: Any, parameters: Mapping[str, Any], layouts: Mapping[str, Layout]) -> Iterator[str]:
    """What keeps the file's tensors and the model's parameters from being one to one, a line each."""
    wanted = {}
    for name, leaf in parameters.items():
        if name in layouts:
            wanted |= layouts[name].tensor_shapes(leaf.shape)
        else:
            yield f"no tensor is known for parameter {name}"
    found = set(file.keys())
    yield from (f"{name} is missing" for name in wanted if name not in found)
    yield from (f"{name} is unexpected" for name in sorted(found - wanted.keys()))
    for name in sorted(found & wanted.keys()):
        shape = tuple(file.get_slice(name).get_shape())
        if shape != wanted[name]:
            yield f"{name} has shape {shape}, not {wanted[name]}"


def _load_parameter(file: Any, layout: Layout, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    sizes = dict(zip(layout.dimensions, leaf.shape, strict=True))
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)

    @functools.cache  # Replicas on this host share one read.
    def read_shard(*ranges: range) -> np.ndarray:
        block = dict(zip(layout.dimensions, ranges, strict=True))
        shard = np.empty([len(part) for part in ranges], leaf.dtype)
        for place in itertools.product(*(enumerate(block[dimension]) for dimension in layout.stacked)):
            local, indices = tuple(i for i, _ in place), tuple(i for _, i in place)
            shard[local] = _read_tensor(file.get_slice(layout.name(indices)), layout, sizes, block)
        return shard

    def on_device(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return read_shard(*(range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)))

    return jax.make_array_from_callback(leaf.shape, sharding, on_device)


def _read_tensor(tensor: Any, layout: Layout, sizes: Mapping[str, int], block: Mapping[str, range]) -> np.ndarray:
    """The part of one stored tensor that lies in `block`, in the parameter's order of dimensions."""
    groups, letters = layout.stored.split(), layout.stored.replace(" ", "")
    rows = []
    for first, *rest in groups:
        stride = math.prod(sizes[letter] for letter in rest)
        rows.append(slice(block[first].start * stride, block[first].stop * stride))
    outer = {group[0] for group in groups}
    shape = [len(block[letter]) if letter in outer else sizes[letter] for letter in letters]
    inner = [slice(None) if letter in outer else slice(block[letter].start, block[letter].stop) for letter in letters]
    part = tensor[tuple(rows)].reshape(shape)[tuple(inner)]
    order = [letters.index(dimension) for dimension in layout.dimensions if dimension not in layout.stacked]
    return part.transpose(order)
