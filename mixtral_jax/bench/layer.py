"""Times one MoE layer, forward and gradient, in turn with that of transformers.

Both have the same weights and tokens, and run in the same minutes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.bench.alternate import alternate
from mixtral_jax.bench.peer import import_peer, require_one_device
from mixtral_jax.config import Config
from mixtral_jax.kernels.choose import choose_kernels
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.parallel.rules import AxisRules

ALTERNATIONS = 10
# Computes all gradients, and returns y and the gradient of x.
Measure = Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Input, cotangent of the output and weights of a layer, all float32."""

    x_MD: np.ndarray
    cotangent_MD: np.ndarray
    router_DE: np.ndarray
    gate_EDF: np.ndarray
    up_EDF: np.ndarray
    down_EFD: np.ndarray


def make_case(config: Config, routing: str) -> Case:
    """Makes random weights and tokens, routed as `routing` names.

    The router's logits are noise plus one offset per expert, which comes from a feature that is 1.
    """
    model, M = config.model, config.train.micro_batch_size * config.train.sequence_length
    D, F, E = model.hidden_size, model.intermediate_size, model.num_experts
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, M, D), np.float32)
    router = rng.standard_normal((D, E), np.float32) * D**-0.5
    x[:, 0], router[0] = (
        1,
        {
            "balanced": np.zeros(E),
            "all to one": 8.0 * (np.arange(E) == 0),
            "zipf": -np.log(np.arange(E) + 1.0),
        }[routing],
    )
    gate, up = rng.standard_normal((2, E, D, F), np.float32) * D**-0.5
    return Case(
        x, cotangent, router, gate, up, rng.standard_normal((E, F, D), np.float32) * F**-0.5
    )


def describe_layer(figures: dict[str, dict[str, float]]) -> str:
    """One line per routing."""
    return "\n".join(
        f"MoE layer, forward and gradient, {routing:<10}: {times['seconds']:.3f} s; transformers "
        f"{times['transformers_seconds']:.3f} s; {times['times_as_fast']:.2f} times as fast"
        for routing, times in figures.items()
    )


def measure_layer(config: Config, mesh: jax.sharding.Mesh) -> dict[str, dict[str, float]]:
    """Measures, for each routing, the seconds of ours and theirs and how many times faster ours is.

    The seconds are medians over runs that alternate between the two.

    Raises:
        ConfigError: torch and transformers are not installed, or more than one device was asked
            for.
    """
    require_one_device(mesh, "--layer")
    figures = {}
    for routing in ("balanced", "all to one", "zipf"):
        case = make_case(config, routing)
        with jax.set_mesh(mesh):
            programs = {"ours": make_ours(config, case), "theirs": make_theirs(config, case)}
            runs = alternate(programs, ALTERNATIONS, _require_same_arrays)
        mine, other = (program.median_seconds for program in runs.values())
        figures[routing] = {
            "seconds": mine,
            "transformers_seconds": other,
            "times_as_fast": other / mine,
        }
    return figures


def _require_same_arrays(mine: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> None:
    for my, other in zip(mine, others, strict=True):
        difference = np.linalg.norm(my - other) / np.linalg.norm(other)
        assert difference < 1e-4, f"the layers differ by {difference}: they do not do the same work"


def make_ours(config: Config, case: Case) -> Measure:
    """Returns a function that computes all gradients and returns y and the gradient of x."""
    platform = jax.devices()[0].platform
    layer = jax.jit(
        lambda: MoE(
            config.model,
            config.router,
            config.dispatch,
            choose_kernels(config, platform),
            AxisRules(),
            nnx.Rngs(0),
        )
    )()
    projections = (layer.router.gate, layer.experts.gate, layer.experts.up, layer.experts.down)
    for projection, value in zip(
        projections, (case.router_DE, case.gate_EDF, case.up_EDF, case.down_EFD), strict=True
    ):
        projection.weight[...] = jax.device_put(value, projection.weight[...].sharding)
    x_1MD, cotangent_1MD = jnp.asarray(case.x_MD)[None], jnp.asarray(case.cotangent_MD)[None]
    ones_1M = jnp.ones(x_1MD.shape[:2], jnp.int32)
    tokens = Tokens(ones_1M, ones_1M, ones_1M)

    @jax.jit
    def step(layer, x_1MD):
        def loss(layer, x_1MD):
            y_1MD = layer(x_1MD, tokens).y_BTD
            return jnp.sum(y_1MD * cotangent_1MD), y_1MD

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x_1MD)

    def run() -> tuple[np.ndarray, np.ndarray]:
        (_, y_1MD), (_, dx_1MD) = jax.block_until_ready(step(layer, x_1MD))
        return np.asarray(y_1MD)[0], np.asarray(dx_1MD)[0]

    return run


def make_theirs(config: Config, case: Case) -> Measure:
    """Returns the same for transformers' Mixtral block with its `grouped_mm` experts."""
    torch, transformers = import_peer("--layer")
    model = config.model
    theirs = transformers.MixtralConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_local_experts=model.num_experts,
        num_experts_per_tok=config.router.num_experts_per_token,
    )
    theirs._experts_implementation = "grouped_mm"
    block = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(theirs)
    gate_up = np.concatenate([case.gate_EDF, case.up_EDF], axis=-1).swapaxes(1, 2)
    values = (case.router_DE.T, gate_up, case.down_EFD.swapaxes(1, 2))
    parameters = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = torch.tensor(np.ascontiguousarray(value))
    x, cotangent = (
        torch.tensor(case.x_MD)[None].requires_grad_(),
        torch.tensor(case.cotangent_MD)[None],
    )

    def run() -> tuple[np.ndarray, np.ndarray]:
        x.grad = None
        block.zero_grad()
        y = block(x)
        (y * cotangent).sum().backward()
        assert x.grad is not None
        return y.detach().numpy()[0], x.grad.numpy()[0]

    return run
