"""What is balanced: a micro-batch, a sequence, or the global batch."""

from typing import Any

import pytest

from tests.cases import packed_batch, relative_norm, small_config
from tests.training.steps import gradients_of, in_micro_batches, train


@pytest.mark.parametrize("normalization", ["hf", pytest.param("switch", marks=pytest.mark.meshes)])
def test_balance_of_the_global_batch_is_that_of_one_big_batch(normalization: str) -> None:
    keys = {
        "router__load_balance__weight": 10.0,
        "router__load_balance__normalization": normalization,
    }
    config = small_config(**keys, router__load_balance__scope="global")
    batch = packed_batch(config)
    whole, expected = train(small_config(**keys), batch, {})
    parts, got = train(*in_micro_batches(config, batch), {"expert": 2})
    assert got["load_balance_loss"] == pytest.approx(expected["load_balance_loss"], rel=1e-5)
    for name, gradient in gradients_of(whole).items():
        assert relative_norm(gradients_of(parts)[name], gradient) < 1e-5, name


def test_balance_of_micro_batches_is_not_that_of_one_big_batch() -> None:
    config = small_config(router__load_balance__weight=10.0)
    batch = packed_batch(config)
    _, whole = train(config, batch, {})
    _, parts = train(*in_micro_batches(config, batch), {})
    assert parts["load_balance_loss"] > 1.001 * whole["load_balance_loss"]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(
            {"router__load_balance__scope": "sequence", "router__load_balance__weight": 10.0},
            id="scope",
        ),
        pytest.param(
            {
                "router__load_balance__weight": 0.0,
                "router__sequence_loss_weight": 10.0,
                "router__score": "sigmoid",
            },
            id="complementary",
            marks=pytest.mark.meshes,
        ),
    ],
)
def test_balance_within_sequences_does_not_depend_on_micro_batches(keys: dict[str, Any]) -> None:
    config = small_config(**keys)
    batch = packed_batch(config)
    whole, expected = train(config, batch, {})
    parts, got = train(*in_micro_batches(config, batch), {"expert": 2})
    assert (
        got["sequence_balance_loss"]
        == pytest.approx(expected["sequence_balance_loss"], rel=1e-5)
        != 1
    )
    router = small_config().router
    plain = expected["loss"] + router.z_loss_weight * expected["router_z_loss"]
    assert expected["total_loss"] == pytest.approx(
        plain + 10.0 * expected["sequence_balance_loss"], rel=1e-6
    )
    for name, gradient in gradients_of(whole).items():
        assert relative_norm(gradients_of(parts)[name], gradient) < 1e-5, name
