"""A routing analysis of a model: the same on every mesh, compared with earlier steps and dtypes."""

import weakref

import jax
import numpy as np
import pytest

from mixtral_jax.kernels.choose import choose_kernels
from mixtral_jax.lab.routing.analysis import RoutedText, analyze, computing_in
from mixtral_jax.lab.routing.counts import route
from mixtral_jax.model.transformer import model_maker
from mixtral_jax.pretrained import Pretrained
from tests.cases import RULES, mesh_of, on_mesh, packed_batch, small_config

NUM_BATCHES = 4
MESHES = ({}, {"expert": 4, "fsdp": 2})


def load(mesh, **overrides):
    """Returns a model as `load_pretrained` does, with the initial weights of its seed."""
    config = small_config(**overrides)
    kernels = choose_kernels(config, "cpu")
    with jax.set_mesh(mesh):
        model = jax.jit(model_maker(config, kernels))()
    return Pretrained(config, model, None, mesh, kernels)


def text_of(loaded):
    """Batches without labels. It is an error to hold more than three of them at once."""

    def batches():
        made = []
        for seed in range(NUM_BATCHES):
            batch = on_mesh(packed_batch(loaded.config, seed), loaded.mesh)
            made.append(weakref.ref(batch.tokens))
            assert sum(ref() is not None for ref in made) <= 3
            yield batch

    with jax.set_mesh(loaded.mesh):
        sharding = jax.NamedSharding(loaded.mesh, RULES.spec(None, "batch"))
        none = jax.device_put(np.zeros((0, 8, 24), np.int32), sharding)
    return RoutedText(batches, [none] * NUM_BATCHES, {}, [str(token) for token in range(96)])


@pytest.fixture(scope="module")
def models():
    """The model on each mesh, with its weights of seed 0."""
    return [load(mesh_of(**sizes)) for sizes in MESHES]


@pytest.fixture(scope="module")
def analyses(models):
    """The analysis on each mesh, compared with other weights (step 10) and the same (step 20)."""

    def analyze_on(loaded):
        earlier = {20: lambda: load(loaded.mesh), 10: lambda: load(loaded.mesh, train__seed=10)}
        return analyze(loaded, text_of(loaded), earlier=earlier)

    return [analyze_on(loaded) for loaded in models]


def test_an_analysis_is_the_same_on_every_mesh(analyses):
    one, other = ({k: v for k, v in a.to_json().items() if k != "flips"} for a in analyses)
    assert one == other


def test_saturation_compares_earlier_steps_with_the_last(analyses):
    saturation = analyses[0].saturation
    assert saturation.steps == (10, 20) and saturation.chance == 2 / 8
    assert (saturation.share_SL[0] < 0.6).all()
    np.testing.assert_array_equal(saturation.share_SL[1], 1)


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_flips_are_the_tokens_whose_set_of_experts_changes_with_the_dtype(models, analyses, number):
    loaded, flips = models[number], analyses[number].flips
    with jax.set_mesh(loaded.mesh):
        half_model = computing_in(loaded, "bfloat16")
        changed, tokens = np.zeros(2), 0
        for batch in text_of(loaded).batches():
            half = np.asarray(route(half_model, batch, "bfloat16"))
            full = np.asarray(route(loaded.model, batch, "float32"))
            is_real = np.asarray(batch.segment_ids[0]) > 0
            tokens += is_real.sum()
            changed += (np.sort(half) != np.sort(full)).any(-1)[:, is_real].sum(-1)
    assert (flips.dtype, flips.other_dtype) == ("float32", "bfloat16")
    np.testing.assert_allclose(flips.any_L, changed / tokens, rtol=1e-12)
    assert 0 < flips.any_L.max() < 0.5
