"""Our own names for the parameters, with the dimensions, shape and chunk of each.

`layouts` maps other programs' tensors to these names. `PARAMETERS` are the parameters of a plain
Mixtral, for which other programs have names too; `parameters_of` adds those that only our models
can have. The names are those of the leaves of `model.transformer.Transformer`; a test compares
them. So a folder can be read without building a model, and without a device.
"""

from mixtral_jax.config import ModelConfig, RouterConfig

# Each letter is a dimension; `mixtral_jax.model` has the key.
PARAMETERS = {
    "embedding_VD": "VD",
    "blocks/attention_norm/scale": "LD",
    "blocks/attention/query/weight": "LDNH",
    "blocks/attention/key/weight": "LDKH",
    "blocks/attention/value/weight": "LDKH",
    "blocks/attention/out/weight": "LNHD",
    "blocks/moe_norm/scale": "LD",
    "blocks/moe/router/gate/weight": "LDE",
    "blocks/moe/experts/gate/weight": "LEDF",
    "blocks/moe/experts/up/weight": "LEDF",
    "blocks/moe/experts/down/weight": "LEFD",
    "norm/scale": "D",
    "unembed/weight": "DV",
}
_SHARED_EXPERTS = {
    "blocks/moe/shared_experts/gate/weight": "LDU",
    "blocks/moe/shared_experts/up/weight": "LDU",
    "blocks/moe/shared_experts/down/weight": "LUD",
}
_BALANCE_BIAS = {"blocks/moe/router/bias": "LE"}
_LETTERS = PARAMETERS | _SHARED_EXPERTS | _BALANCE_BIAS


def parameters_of(model: ModelConfig, router: RouterConfig) -> dict[str, str]:
    """The names of a model's parameters, each with its dimensions.

    Includes the balance bias, which training steps change without a gradient.
    """
    names = PARAMETERS | _SHARED_EXPERTS if model.num_shared_experts else PARAMETERS
    return names | _BALANCE_BIAS if router.bias.update_rate else names


def dimension_sizes(model: ModelConfig) -> dict[str, int]:
    """The size of each dimension, by its letter."""
    return {
        "V": model.vocab_size,
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "U": model.num_shared_experts * model.intermediate_size,
        "L": model.num_layers,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_dim,
        "E": model.num_experts,
    }


def parameter_shape(parameter: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of a parameter."""
    sizes = dimension_sizes(model)
    return tuple(sizes[dimension] for dimension in _LETTERS[parameter])


def parameter_chunk(parameter: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of a parameter's chunk: one layer and, where experts are stacked, one expert."""
    num_stacked = len(_LETTERS[parameter]) - len(chunk_dimensions(parameter))
    return (1,) * num_stacked + parameter_shape(parameter, model)[num_stacked:]


def chunk_dimensions(parameter: str) -> str:
    """The letters of the dimensions that a chunk contains in full."""
    dimensions = _LETTERS[parameter]
    return dimensions.removeprefix("LE" if "F" in dimensions else "L")
