"""The whole decoder: embedding, a scanned stack of blocks, unembedding. Counts its parameters."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter

from mixtral_jax.config import Config, DispatchConfig, ModelConfig, RematName, RouterConfig
from mixtral_jax.kernels.attention import KeyValues, Past
from mixtral_jax.kernels.choose import Kernels
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.dispatch.region import ARRIVED
from mixtral_jax.model.layers import Projection, RMSNorm
from mixtral_jax.model.moe import ExpertsOfLayer, MoE, Routing
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ARRIVED),
    ),
    "none": None,  # Not even `jax.checkpoint`, which copies all that it saves.
}


# Every layer that is written out adds to the time that the program takes to compile.
MAX_LAYERS_WRITTEN_OUT = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """Next-token logits in the compute dtype, and the routing of all layers with a leading L."""

    logits_BTV: jax.Array
    routing: Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """The output of one block, or of all: routing, keys and values then have a leading L."""

    x_BTD: jax.Array
    routing: Routing
    key_values: KeyValues | None


class Block(nnx.Module):
    """Pre-norm attention and a pre-norm mixture of experts, each with a residual."""

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        kernels: Kernels,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, kernels.attention.name, rules, rngs)
        self.moe_norm = RMSNorm(config)
        self.moe = MoE(config, router, dispatch, kernels, rules, rngs)

    def __call__(self, x_BTD: jax.Array, tokens: Tokens, past: Past | None = None) -> BlockOutput:
        attended = self.attention(
            self.attention_norm(x_BTD), tokens.positions_BT, tokens.segment_ids_BT, past
        )
        x_BTD = x_BTD + attended.y_BTD
        mixed = self.moe(self.moe_norm(x_BTD), tokens)
        return BlockOutput(x_BTD + mixed.y_BTD, mixed.routing, attended.key_values)


class Transformer(nnx.Module):
    """Mixtral: decoder-only, every block sparse. Blocks are stacked on a leading layer axis.

    Build and call it under `jax.set_mesh`, best inside `jax.jit`, so that parameters are sharded
    from the start. `kernels` names the attention, the grouped matmul, the transport and what layers
    keep for the backward pass; what the configs request for them is ignored.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        dispatch: DispatchConfig,
        kernels: Kernels,
        *,
        rules: AxisRules,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.num_experts_per_token = router.num_experts_per_token
        self.remat: RematName = kernels.remat.name
        self.rules = rules

        def make_block(rngs: nnx.Rngs) -> Block:
            return Block(config, router, dispatch, kernels, rules, rngs)

        init = nnx.initializers.normal(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        table = init(
            rngs.params(), shape, config.param_dtype, out_sharding=rules.spec(None, "embedding")
        )
        self.embedding_VD = nnx.Param(table)
        self.blocks = jax.vmap(make_block)(rngs.split(config.num_layers))
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
        """Runs the decoder on int32 tokens [B, T].

        B must be a multiple of the number of devices that share the batch. `segment_ids_BT` numbers
        the documents of a row from 1, and is 0 at padding, which is neither attended to, routed nor
        counted. `positions_BT` restart in each document. By default a row is one document.
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
        """Runs the decoder up to the logits.

        These tokens attend to each other and to `past`, which holds the earlier tokens of their
        segments for all layers. `gives_key_values` returns keys and values of the new tokens.
        """
        rows = self.rules.spec("batch", None)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(
                jnp.arange(tokens_BT.shape[1]), tokens_BT.shape, out_sharding=rows
            )
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        tokens = Tokens(tokens_BT, positions_BT, segment_ids_BT)
        reads_in_place = past is not None and self._uses_experts_as_stored()

        def apply_block(x_BTD, layer):
            block, key_values, index = layer
            past_of_layer = past and Past(key_values, past.segment_ids_BS)
            if reads_in_place:
                block.moe.experts = ExpertsOfLayer(self.blocks.moe.experts, index)
            output = block(x_BTD, tokens, past_of_layer)
            return output.x_BTD, (output.routing, output.key_values if gives_key_values else None)

        policy = REMAT_POLICIES[self.remat]
        body = apply_block if policy is None else jax.checkpoint(apply_block, policy=policy)
        indices = jnp.arange(self.config.num_layers) if reads_in_place else None
        layers = (self.blocks, past and past.key_values, indices)
        fold = _fold_written_out if past is None and self._is_written_out() else jax.lax.scan
        x_BTD, (routing, key_values) = fold(body, self._embed(tokens_BT), layers)
        return BlockOutput(x_BTD, routing, key_values)

    def _is_written_out(self) -> bool:
        """True if the program holds every layer, instead of a loop over them.

        A loop would copy what each layer keeps, its weights and its gradient.
        """
        return self.remat == "none" and self.config.num_layers <= MAX_LAYERS_WRITTEN_OUT

    def _uses_experts_as_stored(self) -> bool:
        """True if the experts' weights are neither cast nor gathered before use."""
        is_cast = self.config.param_dtype != self.config.dtype
        return not is_cast and jax.sharding.get_abstract_mesh().shape["fsdp"] == 1

    @jax.named_scope("embeddings")
    def to_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] of the blocks' output, in the compute dtype."""
        return self.unembed(self.norm(x_BTD), self.rules.spec("batch", None, "act_vocab"))

    @jax.named_scope("embeddings")
    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = jax.reshard(
            self.embedding_VD[...].astype(self.config.dtype), self.rules.spec(None, None)
        )
        return table_VD.at[tokens_BT].get(out_sharding=self.rules.spec("batch", None, None))


def _fold_written_out(body: Callable[..., Any], carry: Any, layers: Any) -> tuple[Any, Any]:
    """As `jax.lax.scan`, but with the body once for each layer."""
    outputs = []
    for layer in _unstack(layers):
        carry, output = body(carry, layer)
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@jax.custom_vjp
def _unstack(stack: Any) -> list[Any]:
    """The parts of arrays along their first dimension. Autodiff would add padded gradients up."""
    length = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(operator.itemgetter(i), stack) for i in range(length)]


def _stack_gradients(_: None, gradients: list[Any]) -> tuple[Any]:
    def stack(*leaves: Any) -> jax.Array | None:
        # What has no gradient, such as a random key, has `float0` instead.
        return None if leaves[0].dtype == jax.dtypes.float0 else jnp.stack(leaves)

    return (jax.tree.map(stack, *gradients),)


_unstack.defvjp(lambda stack: (_unstack(stack), None), _stack_gradients)


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes:
        total: all parameters.
        active: the parameters that work on one token.
        multiplying: the active parameters that multiply, which are all but the embedding.
    """

    total: int
    active: int
    multiplying: int


def count_parameters(model: Transformer, kind: Filter = nnx.Param) -> ParameterCount:
    """Counts the parameters of `kind` in a model.

    `model` may also be the shapes of one, as `jax.eval_shape` of its maker returns them.
    """
    E, chosen = model.config.num_experts, model.num_experts_per_token
    total = active = looked_up = 0
    for path, leaf in jax.tree.flatten_with_path(nnx.state(model, kind))[0]:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        total += leaf.size
        active += leaf.size * chosen // E if "experts" in names else leaf.size
        looked_up += leaf.size if "embedding_VD" in names else 0
    return ParameterCount(total, active, active - looked_up)


def model_maker(
    config: Config, kernels: Kernels, rules: AxisRules = AxisRules()
) -> Callable[[], Transformer]:
    """A function that initialises the model of a run from the run's seed.

    It runs `kernels`, whatever the config asks for.
    """
    return lambda: Transformer(
        config.model,
        config.router,
        config.dispatch,
        kernels,
        rules=rules,
        rngs=nnx.Rngs(config.train.seed),
    )
