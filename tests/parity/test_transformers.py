"""Random Mixtrals of several shapes compute the same as transformers does from the same folder.

Only `make test-parity` runs these tests: they need torch and transformers.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.cases import mesh_of
from tests.golden.comparison import (
    IGNORED,
    Part,
    adamw_trajectory,
    load,
    make_batch,
    outputs_and_losses,
)

torch = pytest.importorskip("torch", reason="parity needs torch: make test-parity installs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Warnings of another package.
    transformers = pytest.importorskip("transformers")

SHAPES = {
    "4 experts, top 1, wide heads": {
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "rope_theta": 10_000.0,
        "router_aux_loss_coef": 0.05,
    },
    "6 experts, top 3, one key head": {
        "vocab_size": 98,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "rope_theta": 500.0,
        "router_aux_loss_coef": 0.02,
    },
    "16 experts, top 3, implied head size": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": None,
        "num_local_experts": 16,
        "num_experts_per_tok": 3,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.3,
    },
}
MESHES = {4: {"expert": 4, "fsdp": 2}, 6: {"expert": 2, "fsdp": 2, "data": 2}, 16: {"expert": 8}}

# Logits are of order 9. The measured difference is 2e-5; transformers in float32 differs from
# itself in float64 by as much.
LOGIT_TOLERANCE = 5e-5
# Relative. The measured differences are 5e-7 for losses, and 9e-6 for the norm of gradients, where
# transformers in float32 differs from itself in float64 by 6e-6.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one program for one shape.

    Has only real tokens: arrays are [tokens, ...] or [L, tokens, ...].
    """

    logits: np.ndarray
    router_logits: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    parts: dict[str, Part]
    trajectory: list[float]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Right-padded arrays, as transformers takes them."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Results, Results]]:
    """The results of both programs for one shape."""
    model, inputs = random_model(request.param), random_inputs(request.param["vocab_size"])
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    theirs = compute_theirs(model, inputs)
    mesh = mesh_of(**MESHES[request.param["num_local_experts"]])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        yield theirs, compute_ours(folder, inputs)


def random_model(shape: dict) -> Any:
    torch.manual_seed(5)
    rope = {"rope_theta": shape["rope_theta"], "rope_type": "default"}
    config = transformers.MixtralConfig(**shape, rope_parameters=rope, attn_implementation="eager")
    model = transformers.MixtralForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Scales are far from 1, so that one applied in the wrong place is noticed; the other
            # weights are large, so that routing is clear.
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.0 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
    return model


def random_inputs(vocab_size: int) -> Inputs:
    rng = np.random.default_rng(11)
    input_ids = rng.integers(0, vocab_size, (3, 21))
    attention_mask = (np.arange(21) < np.array([[21], [13], [4]])).astype(np.int64)
    labels = np.where(attention_mask > 0, input_ids, IGNORED)
    labels[0, :6] = IGNORED  # A prompt: routed and balanced, not learned.
    return Inputs(input_ids, attention_mask, labels)


def compute_theirs(model: Any, inputs: Inputs) -> Results:
    tensors = {name: torch.tensor(array) for name, array in dataclasses.asdict(inputs).items()}
    is_real = inputs.attention_mask.reshape(-1) > 0

    output = model(**tensors, output_router_logits=True)
    router_logits = torch.stack(output.router_logits).detach()[:, torch.tensor(is_real)]
    top = torch.topk(torch.softmax(router_logits, -1), model.config.num_experts_per_tok, dim=-1)
    losses = {"total": output.loss, "ce": model(**tensors).loss, "aux": output.aux_loss}
    parts = {name: Part(loss.item(), gradients_of(loss, model)) for name, loss in losses.items()}
    return Results(
        output.logits.detach().flatten(0, 1).numpy()[is_real],
        router_logits.numpy(),
        top.indices.numpy(),
        (top.values / top.values.sum(-1, keepdim=True)).numpy(),
        parts,
        their_trajectory(model, tensors),
    )


def gradients_of(loss: Any, model: Any) -> dict[str, np.ndarray]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name: gradient.numpy() for name, gradient in zip(names, gradients, strict=True)}


def their_trajectory(model: Any, tensors: dict) -> list[float]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    trajectory = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**tensors, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        trajectory.append(loss.item())
    return trajectory


def compute_ours(folder: Path, inputs: Inputs) -> Results:
    model, router = load(folder)
    batch = make_batch(inputs.input_ids, inputs.attention_mask, inputs.labels)
    output, parts = outputs_and_losses(model, batch, router)
    is_real, routing = inputs.attention_mask > 0, output.routing
    logits = np.asarray(output.logits_BTV)[: len(is_real)][is_real]
    chosen = (routing.logits_BTE, routing.experts_BTA, routing.weights_BTA)
    router_logits, experts, weights = (
        np.asarray(array)[:, : len(is_real)][:, is_real] for array in chosen
    )
    return Results(
        logits, router_logits, experts, weights, parts, adamw_trajectory(model, batch, router)
    )


def test_logits_are_equal(results):
    theirs, ours = results
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(
        ours.router_logits, theirs.router_logits, rtol=0, atol=LOGIT_TOLERANCE
    )


def test_every_token_goes_to_the_same_experts_with_the_same_weights(results):
    theirs, ours = results
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=0, atol=LOGIT_TOLERANCE)


def test_every_expert_gets_tokens_and_no_layer_routes_alike(results):
    """Otherwise the comparison would prove nothing."""
    theirs, _ = results
    num_experts = theirs.router_logits.shape[-1]
    assert set(theirs.experts.reshape(-1)) == set(range(num_experts))
    assert not np.array_equal(theirs.experts[0], theirs.experts[1])


@pytest.mark.parametrize("part", ["total", "ce", "aux"])
def test_losses_are_equal(results, part):
    theirs, ours = results
    np.testing.assert_allclose(
        ours.parts[part].value, theirs.parts[part].value, rtol=LOSS_TOLERANCE
    )


@pytest.mark.parametrize("part", ["total", "ce", "aux"])
def test_gradients_of_every_parameter_are_equal(results, part):
    theirs, ours = results
    expected, got = theirs.parts[part].gradients, ours.parts[part].gradients
    assert got.keys() == expected.keys()
    # With one expert per token its weight is always 1, and the router's gradient in transformers is
    # nothing but rounding errors.
    noise = 1e-7 * np.linalg.norm([np.linalg.norm(gradient) for gradient in expected.values()])
    for name, gradient in expected.items():
        difference = np.linalg.norm((got[name] - gradient).astype(np.float64))
        assert difference < noise + GRADIENT_TOLERANCE * np.linalg.norm(gradient), name


def test_five_steps_of_adamw_lose_the_same(results):
    theirs, ours = results
    np.testing.assert_allclose(ours.trajectory, theirs.trajectory, rtol=LOSS_TOLERANCE)
