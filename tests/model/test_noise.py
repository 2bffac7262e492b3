"""The noise of training: when it is there, that it does not depend on the mesh, and its spread."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import NoiseConfig
from mixtral_jax.model.noise import add_noise, jitter
from tests.cases import RULES, keep_some, mesh_of, relative_norm
from tests.model.routed_layer import LayerRun, config_of, run

NOISE = {
    "jitter": {"noise__jitter": 0.1},
    "noisy": {"noise__noisy_top_k": 4.0},
    "gumbel": {"noise__gumbel": 1.0},
}


@functools.cache
def run_plain() -> LayerRun:
    return run(config_of({}))


@pytest.mark.parametrize("options", keep_some(NOISE, "jitter"))
def test_noise_is_there_in_training_alone_and_the_same_on_a_mesh(options: dict[str, Any]) -> None:
    config, plain = config_of(options), run_plain()
    calm = run(config, is_training=False)
    np.testing.assert_array_equal(calm.y, plain.y)
    alone, spread = run(config), run(config, sizes={"expert": 4, "fsdp": 2})
    assert relative_norm(alone.y, plain.y) > 1e-2
    assert relative_norm(spread.y, alone.y) < 1e-5
    # Routes keep their logits without noise, so only noise on the input shows in them.
    is_on_logits = "noise__jitter" not in options
    is_same = np.array_equal(alone.routing.logits_BTE, plain.routing.logits_BTE)
    assert is_same == is_on_logits


def test_noise_has_the_spread_that_it_says() -> None:
    key, shape = jax.random.key(0), (8, 500, 8)
    with jax.set_mesh(mesh_of()):
        rows = RULES.spec("batch", None, None)
        zeros = jnp.zeros(shape)
        normal = np.asarray(add_noise(zeros, NoiseConfig(noisy_top_k=2.0), key, rows))
        gumbel = np.asarray(add_noise(zeros, NoiseConfig(gumbel=0.5), key, rows))
        factor = np.asarray(jitter(zeros + 1, NoiseConfig(jitter=0.2), key, rows))
    assert normal.std() == pytest.approx(2.0 / 8, rel=0.03) and abs(normal.mean()) < 0.01
    assert gumbel.mean() == pytest.approx(0.5 * 0.5772, rel=0.03)
    assert gumbel.std() == pytest.approx(0.5 * np.pi / np.sqrt(6), rel=0.03)
    assert 0.8 <= factor.min() < 0.81 and 1.19 < factor.max() <= 1.2
