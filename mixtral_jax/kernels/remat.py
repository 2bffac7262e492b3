"""Chooses what the layers keep for the backward pass, by what fits in the memory of a device.

The sizes are formulas, so that no program need be compiled to choose. They are upper bounds: the
compiler fuses some of these arrays away.
"""

import math

from mixtral_jax.config import Config, RematName

# Least work first.
_POLICIES: tuple[RematName, ...] = ("none", "dots")
# The rest is for the compiler's buffers, collectives and what other programs hold.
_MAX_USED_FRACTION = 0.8
_FLOAT32_BYTES = 4


def choose_fitting(config: Config, memory_bytes: int) -> RematName:
    """The policy that computes least again among those that fit.

    Args:
        config: its mesh resolved.
        memory_bytes: of a device.
    """
    room = _MAX_USED_FRACTION * memory_bytes - _state_bytes(config) - _logits_bytes(config)
    for policy in _POLICIES:
        if kept_bytes(config, policy) <= room:
            return policy
    return "full"


def kept_bytes(config: Config, policy: RematName) -> int:
    """Bytes of a device that all layers keep for the backward pass, at most."""
    model, mesh = config.model, config.mesh
    D, F, A = model.hidden_size, model.intermediate_size, config.router.num_experts_per_token
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim * 2  # q and output, k and v
    ratio = _buffer_ratio(config)
    # Where the buffer of rows is longer than needed, chunks keep no hidden rows, and `blocks` those
    # of its heads, which are half.
    num_hidden = 3 if ratio == 1 else 1.5
    kept_elements = {
        "full": D,
        # The input, the dense projections, and the rows that arrive at the experts.
        "dots": 2 * D + (heads + D) // mesh.tensor + A * ratio * D,
        # Norms work in float32; experts keep the rows they get and give, and hidden rows.
        "none": 10 * D
        + 2 * heads // mesh.tensor
        + A * (2 * ratio * D + num_hidden * F / mesh.tensor),
    }[policy]
    kept = kept_elements * tokens_per_device(config)
    if policy == "none" and (mesh.fsdp > 1 or model.dtype != model.param_dtype):
        # Weights that were gathered, or cast to the compute dtype.
        kept += _layer_parameters(config)
    return math.ceil(model.num_layers * kept * _compute_bytes(config))


def _state_bytes(config: Config) -> int:
    """Parameters, their gradients and two moments, all in float32; or frozen parameters alone.

    Several micro-batches also have the sum of their gradients.
    """
    model, finetune = config.model, config.finetune
    embeddings = 2 * model.vocab_size * model.hidden_size
    parameters = model.num_layers * _layer_parameters(config) + embeddings
    num_copies = 4 if config.train.gradient_accumulation == 1 else 5
    bytes_per_parameter = num_copies * _FLOAT32_BYTES
    if finetune and finetune.lora.rank:
        frozen_dtype = finetune.frozen_dtype or model.param_dtype
        bytes_per_parameter = _FLOAT32_BYTES if frozen_dtype == "float32" else 2
    return math.ceil(bytes_per_parameter * parameters / config.mesh.fsdp)


def _logits_bytes(config: Config) -> int:
    """The logits, and in float32 their softmax and its gradient."""
    logits = tokens_per_device(config) * config.model.vocab_size // config.mesh.tensor
    return logits * (_compute_bytes(config) + 2 * _FLOAT32_BYTES)


def _layer_parameters(config: Config) -> int:
    """Parameters of a layer on a device, without `fsdp`."""
    model, mesh = config.model, config.mesh
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim * 2
    experts = model.num_experts // (mesh.expert or 1) + model.num_shared_experts
    return model.hidden_size * (heads + 3 * experts * model.intermediate_size) // mesh.tensor


def tokens_per_device(config: Config) -> int:
    """Tokens of a micro-batch on a device."""
    mesh, train = config.mesh, config.train
    num_places = (mesh.data or 1) * mesh.fsdp * (mesh.expert or 1)
    return train.micro_batch_size * train.sequence_length // num_places


def _buffer_ratio(config: Config) -> float:
    """How many times the rows of balanced routing the buffer of a device holds."""
    num_places = config.mesh.expert or 1
    num_local, A = config.model.num_experts // num_places, config.router.num_experts_per_token
    worst = min(A, num_local) * num_places / A
    return min(worst, config.dispatch.buffer_factor or worst)


def _compute_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else _FLOAT32_BYTES
