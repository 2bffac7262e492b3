"""The section `model` of a config: the shape of the model."""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require

# Each name is an implementation in kernels/attention.py.
AttentionName = Literal["xla", "splash"]
# What each layer keeps for the backward pass.
RematName = Literal["full", "dots", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Mixtral decoder, and the dtypes that it computes and stores in.

    - `head_dim` may differ from hidden_size / num_heads.
    - `param_dtype` is the dtype of the stored parameters, `dtype` that of the computation.
    - `remat` says what each layer keeps for the backward pass; the rest is recomputed. `full` keeps
      only the layer's input. `dots` also keeps the results of the dense projections and the rows
      that arrived at the experts. `none` keeps everything. `auto` computes as little as possible
      again among those that fit in memory: see kernels/remat.py.
    - `attention` chooses the kernel: see kernels/attention.py.
    - `context_length` is the longest sequence that the model is meant for. None: the sequence
      length of its training.
    - `num_shared_experts` is the number of experts that process every token, in addition to the
      routed ones (DeepSeekMoE, arXiv 2401.06066).
    - `granularity` m is a shorthand for m times as many experts, each 1/m as large, of which a
      token chooses m times as many. `config.build` replaces it by the other keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["auto", RematName] = "auto"
    attention: Literal["auto", AttentionName] = "auto"
    context_length: int | None = None
    num_shared_experts: int = 0
    granularity: int = 1

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "num_experts",
            "granularity",
        ):
            require(
                getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1"
            )
        require(
            self.num_shared_experts >= 0,
            f"model.num_shared_experts={self.num_shared_experts} must be 0 (none) or more",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} must be a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} must be even: rotary embeddings rotate pairs",
        )
        require(
            self.rope_theta > 1,
            f"model.rope_theta={self.rope_theta} must be over 1 (Mixtral: 1e6)",
        )
        require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be positive")
