"""A golden folder, loaded as users load it, computes what transformers computed from it."""

from pathlib import Path

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from tests.cases import mesh_of

GOLDEN = Path(__file__).parent / "golden"
HF = GOLDEN / "hf_tiny"
# The whole range of logits is 10; measured: 5e-6.
LOGIT_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(HF / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("folder", ["hf_tiny", "mistral_tiny"])
@pytest.mark.parametrize("sizes", [{}, {"expert": 4, "tensor": 2}], ids=str)
def test_a_batch_of_any_size_has_the_logits_and_the_loss_of_transformers(folder, sizes, expected):
    loaded = mixtral_jax.load_pretrained(GOLDEN / folder, dtype="float32", mesh=mesh_of(**sizes))
    tokens, mask = expected["input_ids"], expected["attention_mask"]
    logits = loaded.logits(tokens, mask)
    assert logits.dtype == np.float32
    assert logits.shape == expected["logits"].shape
    np.testing.assert_allclose(
        logits[mask > 0], expected["logits"][mask > 0], rtol=0, atol=LOGIT_TOLERANCE
    )
    loss = loaded.load_balance_loss(tokens, mask)
    np.testing.assert_allclose(loss, expected["aux_loss_with_attention_mask"], rtol=1e-5)
    assert loaded.tokenizer is None
    assert loaded.config.mesh.expert == sizes.get("expert", 1)


def test_float16_is_held_so_and_computed_in_float32(expected):
    held = mixtral_jax.load_pretrained(HF, dtype="float16", mesh=mesh_of())
    model = held.config.model
    assert (model.param_dtype, model.dtype) == ("float16", "float32")
    assert held.model.embedding_VD[...].dtype == np.float16
    logits = held.logits(expected["input_ids"], expected["attention_mask"])
    is_real = expected["attention_mask"] > 0
    # As far as the weights are rounded.
    np.testing.assert_allclose(logits[is_real], expected["logits"][is_real], rtol=0, atol=0.02)


def test_the_default_mesh_is_all_devices_with_experts_first():
    assert mixtral_jax.load_pretrained(HF).mesh.shape["expert"] == 8


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [([[512]], None), ([[-1]], None), ([1], None), ([[1]], [[1, 1]]), ([[]], None)],
)
def test_tokens_that_are_none_are_refused(tokens, mask):
    loaded = mixtral_jax.load_pretrained(HF, mesh=mesh_of())
    with pytest.raises(ConfigError):
        loaded.logits(np.array(tokens), None if mask is None else np.array(mask))
