"""One MoE layer with a router of any options, run on any mesh: its output, routes and gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.config import Config
from mixtral_jax.model.moe import MoE, Routing
from mixtral_jax.model.tokens import Tokens
from tests.cases import RULES, kernels_of, mesh_of, small_config

B, T, D, E = 8, 12, 32, 8
# Options of the router, as keys of its section.
NO_LOSS = {"load_balance__weight": 0, "z_loss_weight": 0}
SINKHORN = {"choice": "sinkhorn", "load_balance__weight": 0}
EXPERT_CHOICE = {
    "choice": "expert_choice",
    "score": "softmax",
    "renormalize": False,
    "load_balance__weight": 0,
}
GROUPS = {"choice": "group_limited", "score": "sigmoid", "num_groups": 4, "groups_per_token": 2}
BIAS = {"bias__update_rate": 0.1}
NO_BIAS = np.zeros(E)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRun:
    """What one layer computed, on the host."""

    layer: MoE
    y: np.ndarray
    routing: Routing
    gate_gradient: np.ndarray
    x_gradient: np.ndarray


def config_of(options: dict[str, Any], **others: Any) -> Config:
    """A small config with these options of the router; `others` are keys of other sections."""
    return small_config(**{f"router__{name}": value for name, value in options.items()}, **others)


def inputs() -> tuple[np.ndarray, Tokens]:
    """Activations, and tokens of which some are padding."""
    rng = np.random.default_rng(3)
    segments = np.ones((B, T), np.int32)
    segments[1, 5:], segments[2], segments[3, :3], segments[4, 6:] = 0, 0, 0, 2
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ids = rng.integers(0, 96, (B, T), dtype=np.int32)
    return rng.normal(size=(B, T, D)).astype(np.float32), Tokens(ids, positions, segments)


def cotangent() -> np.ndarray:
    """What the output is multiplied by before it is summed to a loss."""
    return np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)


def make_layer(config: Config, bias: np.ndarray, *, is_training: bool) -> MoE:
    """A layer with this balance bias, if it has one; in training mode its key is 5."""
    kernels = kernels_of("all_gather", "ragged_dot")
    layer = MoE(config.model, config.router, config.dispatch, kernels, RULES, nnx.Rngs(0))
    if layer.router.bias is not None:
        layer.router.bias[...] = jnp.asarray(bias)
    layer.router.training_key = jax.random.key(5) if is_training else None
    return layer


def run(
    config: Config,
    bias: np.ndarray = NO_BIAS,
    sizes: dict[str, int] | None = None,
    *,
    is_training: bool = True,
) -> LayerRun:
    """Runs one layer forward and backward on a mesh of these sizes (None: one device)."""
    x, tokens = inputs()
    mesh = mesh_of(**(sizes or {}))

    @jax.jit
    def step(x, tokens, cotangent):
        layer = make_layer(config, bias, is_training=is_training)

        def loss(gate, x):
            own = jax.tree.map(lambda leaf: leaf, layer)
            own.router.gate.weight[...] = gate
            output = own(x, tokens)
            return jnp.sum(output.y_BTD * cotangent), output

        gradients_of_loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, output), gradients = gradients_of_loss(layer.router.gate.weight[...], x)
        return LayerRun(layer, output.y_BTD, output.routing, *gradients)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        arguments = jax.device_put(
            (x, tokens, cotangent()), jax.NamedSharding(mesh, RULES.spec("batch"))
        )
        return jax.device_get(step(*arguments))


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest values of each row, ties by position."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


def taken_by(routing: Routing) -> np.ndarray:
    """Which experts each token visits, bool [B, T, E]."""
    experts, is_kept = np.asarray(routing.experts_BTA), np.asarray(routing.is_kept_BTA)
    is_route = (experts[..., None] == np.arange(E)) & is_kept[..., None]
    assert is_route.sum(axis=2).max() <= 1  # No expert twice.
    return is_route.any(axis=2)
