"""The golden checkpoint computes what transformers computed from it, on one device and with its
experts spread.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.model.balance import load_balance_loss, sum_routing
from mixtral_jax.model.router import Routes
from mixtral_jax.model.transformer import ModelOutput
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.loss import cross_entropy
from tests.cases import mesh_of, relative_norm
from tests.golden.comparison import (
    IGNORED,
    Part,
    adamw_trajectory,
    load,
    make_batch,
    outputs_and_losses,
)

GOLDEN = Path(__file__).parent / "golden" / "hf_tiny"
MESHES = {"one device": {}, "expert=4, fsdp=2": {"expert": 4, "fsdp": 2}}

# Logits are of order 5. Measured: 5e-6; two back ends of transformers differ by 2.5e-6.
LOGIT_TOLERANCE = 2e-5
# Relative, of losses and of gradients in norm. Measured: 3e-7 and 3e-6.
RELATIVE_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Computed:
    """What this program makes of the golden inputs, on the host; rows of padding are gone."""

    output: ModelOutput
    parts: dict[str, Part]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=MESHES.values(), ids=list(MESHES))
def computed(request: pytest.FixtureRequest, expected: dict[str, np.ndarray]) -> Iterator[Computed]:
    with jax.set_mesh(mesh_of(**request.param)), jax.default_matmul_precision("highest"):
        model, router = load(GOLDEN)
        yield Computed(*outputs_and_losses(model, golden_batch(expected), router))


def golden_batch(expected: dict[str, np.ndarray]) -> Batch:
    return make_batch(expected["input_ids"], expected["attention_mask"], expected["labels"])


@pytest.fixture(scope="module")
def is_real(expected: dict[str, np.ndarray]) -> np.ndarray:
    return expected["attention_mask"] > 0


def at_real_tokens(array_LBTX: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    """[L, tokens, X] of the real tokens; rows that were added to fill the mesh are left out."""
    return array_LBTX[:, : len(is_real)][:, is_real]


def real_rows(flat_LRX: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    """The same of an array that transformers has flattened over the batch."""
    return flat_LRX[:, is_real.reshape(-1)]


def test_logits_are_those_of_transformers(computed, expected, is_real):
    got = computed.output.logits_BTV[: len(is_real)]
    np.testing.assert_allclose(
        got[is_real], expected["logits"][is_real], rtol=0, atol=LOGIT_TOLERANCE
    )


def test_router_logits_are_those_of_transformers(computed, expected, is_real):
    got = at_real_tokens(computed.output.routing.logits_BTE, is_real)
    np.testing.assert_allclose(
        got, real_rows(expected["router_logits"], is_real), rtol=0, atol=LOGIT_TOLERANCE
    )


def test_tokens_go_to_the_experts_that_transformers_chose(computed, expected, is_real):
    got = at_real_tokens(computed.output.routing.experts_BTA, is_real)
    np.testing.assert_array_equal(got, real_rows(expected["topk_indices"], is_real))


def test_experts_weigh_what_they_weigh_in_transformers(computed, expected, is_real):
    got = at_real_tokens(computed.output.routing.weights_BTA, is_real)
    np.testing.assert_allclose(
        got, real_rows(expected["topk_weights"], is_real), rtol=0, atol=LOGIT_TOLERANCE
    )


@pytest.mark.parametrize(("labels", "loss"), [("labels", "ce_loss"), ("labels_sft", "ce_loss_sft")])
def test_cross_entropy_is_the_mean_over_supervised_tokens(computed, expected, labels, loss):
    targets = expected[labels][:, 1:]
    logits = computed.output.logits_BTV[: len(targets), :-1]
    counts = targets != IGNORED
    mean = np.sum(np.asarray(cross_entropy(logits, np.maximum(targets, 0))) * counts) / np.sum(
        counts
    )
    np.testing.assert_allclose(mean, expected[loss], rtol=RELATIVE_TOLERANCE)


def test_losses_are_those_of_transformers(computed, expected):
    names = {"total": "loss_total", "ce": "ce_loss", "aux": "aux_loss_with_attention_mask"}
    for part, name in names.items():
        np.testing.assert_allclose(
            computed.parts[part].value, expected[name], rtol=RELATIVE_TOLERANCE, err_msg=name
        )


@pytest.mark.parametrize("mask", ["with", "without"])
def test_hf_balance_loss_pools_layers_as_transformers_does(expected, is_real, mask):
    """From the router logits stored: without a mask, transformers also counts padding that saw only
    real tokens.
    """
    logits = expected["router_logits"].reshape(2, *is_real.shape, 8)
    experts = expected["topk_indices"].reshape(2, *is_real.shape, 2)
    counted = np.broadcast_to(
        is_real if mask == "with" else np.ones_like(is_real), (2, *is_real.shape)
    )
    chosen = np.repeat(counted[..., None], 2, axis=-1)
    scores, weights = jax.nn.softmax(logits), np.zeros(experts.shape)
    routes = Routes(logits, scores, experts, weights, chosen, chosen)
    sums = jax.vmap(sum_routing)(routes, counted, np.zeros(len(logits)))
    loss = load_balance_loss(sums, "hf")
    np.testing.assert_allclose(
        loss, expected[f"aux_loss_{mask}_attention_mask"], rtol=RELATIVE_TOLERANCE
    )


@pytest.mark.parametrize("part", ["total", "ce", "aux"])
def test_gradients_have_the_norms_of_transformers(computed, expected, part):
    gradients = computed.parts[part].gradients
    assert gradients.keys() == set(expected["param_names"])
    norms = [np.linalg.norm(gradients[name].astype(np.float64)) for name in expected["param_names"]]
    np.testing.assert_allclose(
        norms, expected[f"grad_norm_{part}"], rtol=RELATIVE_TOLERANCE, atol=1e-9
    )
    np.testing.assert_allclose(
        np.linalg.norm(norms), expected[f"grad_global_norm_{part}"], rtol=RELATIVE_TOLERANCE
    )


def test_gradients_of_every_expert_have_the_norms_of_transformers(computed, expected):
    gradients, norms = computed.parts["total"].gradients, []
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts."
        gate_EFD, up_EFD = np.split(
            gradients[experts + "gate_up_proj"].astype(np.float64), 2, axis=1
        )
        down_EDF = gradients[experts + "down_proj"].astype(np.float64)
        norms.append([np.linalg.norm(array, axis=(1, 2)) for array in (gate_EFD, down_EDF, up_EFD)])
    got = np.swapaxes(norms, 1, 2)
    np.testing.assert_allclose(
        got, expected["grad_norm_total_per_expert_w1_w2_w3"], rtol=RELATIVE_TOLERANCE
    )


def test_stored_gradients_are_equal_element_by_element(computed, expected):
    stored = [key for key in expected if key.startswith(("grad_total/", "grad_aux/"))]
    assert len(stored) == 9
    for key in stored:
        part, name = key.removeprefix("grad_").split("/")
        if name.startswith("layers."):
            name = "model." + name.replace("gate", "mlp.gate")
        name, _, expert = name.removesuffix("]").partition("[")
        got = computed.parts[part].gradients[name]
        got = got[int(expert)] if expert else got
        assert relative_norm(got, expected[key]) < RELATIVE_TOLERANCE, key


# Not part of the fixture: test processes that share the tests of this file would each compile a
# train step.
@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_five_steps_of_adamw_follow_transformers(expected, sizes):
    with jax.set_mesh(mesh_of(**sizes)), jax.default_matmul_precision("highest"):
        model, router = load(GOLDEN)
        got = adamw_trajectory(model, golden_batch(expected), router)
    np.testing.assert_allclose(
        got, expected["adamw_loss_trajectory_5_steps"], rtol=RELATIVE_TOLERANCE
    )
