"""The experts that every token visits: a dense layer that needs no route and moves no row."""

import jax
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.layers import Projection
from mixtral_jax.parallel.rules import AxisRules


class SharedExperts(nnx.Module):
    """n SwiGLU experts for every token, whose outputs are added to those of the routed experts.

    The sum of n experts of hidden size F equals one expert of size U = n F, so it is computed as
    one. Source: DeepSeekMoE, arXiv 2401.06066, section 3.2 and eq. 9, where each shared expert has
    weight 1.
    """

    def __init__(self, config: ModelConfig, rules: AxisRules, rngs: nnx.Rngs):
        self.rules = rules
        D, U = config.hidden_size, config.num_shared_experts * config.intermediate_size
        settings = {"config": config, "rules": rules, "rngs": rngs}
        self.gate = Projection("BTD,DU->BTU", (D, U), ("dense_embed", "mlp"), **settings)
        self.up = Projection("BTD,DU->BTU", (D, U), ("dense_embed", "mlp"), **settings)
        self.down = Projection("BTU,UD->BTD", (U, D), ("mlp", "dense_embed"), **settings)

    @jax.named_scope("experts")
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        by_hidden = self.rules.spec("batch", None, "act_mlp")
        hidden_BTU = jax.nn.silu(self.gate(x_BTD, by_hidden)) * self.up(x_BTD, by_hidden)
        return self.down(hidden_BTU, self.rules.spec("batch", None, None))
