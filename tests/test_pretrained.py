"""A golden folder, loaded as users load it, computes what transformers computed from it."""

from pathlib import Path

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from tests.cases import mesh_of

HF = Path(__file__).parent / "golden" / "hf_tiny"
# The whole range of logits is 10; measured: 5e-6.
LOGIT_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(HF / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("sizes", [{}, {"expert": 4, "tensor": 2}], ids=str)
def test_a_batch_of_any_size_has_the_logits_and_the_loss_of_transformers(sizes, expected):
    loaded = mixtral_jax.load_pretrained(HF, dtype="float32", mesh=mesh_of(**sizes))
    tokens, mask = expected["input_ids"], expected["attention_mask"]
    logits = loaded.logits(tokens, mask)
    assert logits.dtype == np.float32
    assert logits.shape == expected["logits"].shape
    np.testing.assert_allclose(logits[mask > 0], expected["logits"][mask > 0], rtol=0, atol=LOGIT_TOLERANCE)
    loss = loaded.load_balance_loss(tokens, mask)
    np.testing.assert_allclose(loss, expected["aux_loss_with_attention_mask"], rtol=1e-5)
    assert loaded.tokenizer is None
    assert loaded.config.mesh.expert == sizes.get("expert", 1)


def test_the_default_mesh_is_all_devices_with_experts_first():
    assert mixtral_jax.load_pretrained(HF).mesh.shape["expert"] == 8


@pytest.mark.parametrize(
    ("tokens", "mask"), [([[512]], None), ([[-1]], None), ([1], None), ([[1]], [[1, 1]]), ([[]], None)]
)
def test_tokens_that_are_none_are_refused(tokens, mask):
    loaded = mixtral_jax.load_pretrained(HF, mesh=mesh_of())
    with pytest.raises(ConfigError):
        loaded.logits(np.array(tokens), None if mask is None else np.array(mask))
