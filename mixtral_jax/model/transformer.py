"""The whole decoder: embedding, a scanned stack of blocks, unembedding; and how many parameters it
has.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter

from mixtral_jax.config import Config, DispatchConfig, ModelConfig, RouterConfig
from mixtral_jax.kernels.attention import KeyValues, Past
from mixtral_jax.kernels.grouped_matmul import choose_kernel
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.dispatch.choose import choose_transport
from mixtral_jax.model.dispatch.region import ARRIVED
from mixtral_jax.model.layers import Projection, RMSNorm
from mixtral_jax.model.moe import ExpertsOfLayer, MoE
from mixtral_jax.model.router import Routing
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ARRIVED),
    ),
    "none": jax.checkpoint_policies.everything_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """Next-token logits, in the compute dtype, and every layer's routing, stacked to a leading L."""

    logits_BTV: jax.Array
    routing: Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """What leaves a block, or all of them: routing and keys and values then have a leading L."""

    x_BTD: jax.Array
    routing: Routing
    key_values: KeyValues | None


class Block(nnx.Module):
    """Pre-norm attention and mixture of experts, each with a residual."""

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rules, rngs)
        self.moe_norm = RMSNorm(config)
        self.moe = MoE(config, router, dispatch, rules, rngs)

    def __call__(self, x_BTD: jax.Array, tokens: Tokens, past: Past | None = None) -> BlockOutput:
        attended = self.attention(
            self.attention_norm(x_BTD), tokens.positions_BT, tokens.segment_ids_BT, past
        )
        x_BTD = x_BTD + attended.y_BTD
        y_BTD, routing = self.moe(self.moe_norm(x_BTD), tokens)
        return BlockOutput(x_BTD + y_BTD, routing, attended.key_values)


class Transformer(nnx.Module):
    """Mixtral: decoder-only, every block sparse. Blocks are stacked on a leading layer axis.

    Built and called under `jax.set_mesh`, best inside `jax.jit`, so that parameters are born
    sharded.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        *,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.num_experts_per_token = router.num_experts_per_token
        self.rules = rules
        init = nnx.initializers.normal(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        table = init(
            rngs.params(), shape, config.param_dtype, out_sharding=rules.spec(None, "embedding")
        )
        self.embedding_VD = nnx.Param(table)
        self.blocks = jax.vmap(lambda rngs: Block(config, router, dispatch, rules, rngs))(
            rngs.split(config.num_layers)
        )
        self.norm = RMSNorm(config)
        self.unembed = Projection(
            "BTD,DV->BTV",
            (config.hidden_size, config.vocab_size),
            ("dense_embed", "vocab"),
            config=config,
            rules=rules,
            rngs=rngs,
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> ModelOutput:
        """Runs the decoder on int32 [B, T] tokens, B a multiple of the devices that hold tokens.

        `segment_ids_BT` numbers the documents of a row from 1 and is 0 at padding, which is neither
        attended to, routed nor counted; `positions_BT` restart in each. By default a row is one
        document.
        """
        output = self.run_blocks(tokens_BT, positions_BT, segment_ids_BT)
        return ModelOutput(self.to_logits(output.x_BTD), output.routing)

    def run_blocks(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        past: Past | None = None,
        *,
        gives_key_values: bool = False,
    ) -> BlockOutput:
        """As a call, up to the logits.

        `past`, of all layers, is what these tokens attend to besides each other: those of their own
        segment that came before. Keys and values of the new tokens are given where asked for;
        training has no use for them.
        """
        rows = self.rules.spec("batch", None)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(
                jnp.arange(tokens_BT.shape[1]), tokens_BT.shape, out_sharding=rows
            )
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        tokens = Tokens(tokens_BT, positions_BT, segment_ids_BT)

        def apply_block(x_BTD, layer):
            block, key_values, index = layer
            of_layer = past and Past(key_values, past.segment_ids_BS)
            if reads_in_place:
                block.moe.experts = ExpertsOfLayer(self.blocks.moe.experts, index)
            output = block(x_BTD, tokens, of_layer)
            return output.x_BTD, (output.routing, output.key_values if gives_key_values else None)

        reads_in_place = past is not None and self._holds_experts_as_used()
        body = jax.checkpoint(apply_block, policy=REMAT_POLICIES[self.config.remat])
        indices = jnp.arange(self.config.num_layers) if reads_in_place else None
        layers = (self.blocks, past and past.key_values, indices)
        x_BTD, (routing, key_values) = jax.lax.scan(body, self._embed(tokens_BT), layers)
        return BlockOutput(x_BTD, routing, key_values)

    def _holds_experts_as_used(self) -> bool:
        """Whether weights of experts are neither cast nor gathered on their way: they may be read
        from the stack.
        """
        is_cast = self.config.param_dtype != self.config.dtype
        return not is_cast and jax.sharding.get_abstract_mesh().shape["fsdp"] == 1

    def to_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] of what leaves the blocks, in the compute dtype."""
        return self.unembed(self.norm(x_BTD), self.rules.spec("batch", None, "act_vocab"))

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = jax.reshard(
            self.embedding_VD[...].astype(self.config.dtype), self.rules.spec(None, None)
        )
        return table_VD.at[tokens_BT].get(out_sharding=self.rules.spec("batch", None, None))


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; those that work on one token; and of these those that multiply: not an
    embedding's.
    """

    total: int
    active: int
    multiplying: int


def count_parameters(model: Transformer, kind: Filter = nnx.Param) -> ParameterCount:
    """Counts a model, or the shapes of one (`jax.eval_shape` of its maker): nothing need be
    allocated.

    `kind` tells the parameters that are counted from the others.
    """
    E, chosen = model.config.num_experts, model.num_experts_per_token
    total = active = looked_up = 0
    for path, leaf in jax.tree.flatten_with_path(nnx.state(model, kind))[0]:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        total += leaf.size
        active += leaf.size * chosen // E if "experts" in names else leaf.size
        looked_up += leaf.size if "embedding_VD" in names else 0
    return ParameterCount(total, active, active - looked_up)


def resolve_dispatch(config: Config, platform: str) -> DispatchConfig:
    """The config's choices of transport and kernel with nothing left to `auto`, for devices of
    `platform`.
    """
    return dataclasses.replace(
        config.dispatch,
        transport=choose_transport(config, platform).name,
        grouped_matmul=choose_kernel(config.dispatch, platform).name,
    )


def model_maker(config, kernels, rules: AxisRules = AxisRules()) -> Callable[[], Transformer]:
    """Stub replaced on merge."""
    model = dataclasses.replace(config.model, attention=kernels.attention.name)
    dispatch = dataclasses.replace(
        config.dispatch,
        transport=kernels.transport.name,
        grouped_matmul=kernels.grouped_matmul.name,
    )
    return lambda: Transformer(
        model, config.router, dispatch, rules=rules, rngs=nnx.Rngs(config.train.seed)
    )
