"""Tokens are sampled from the right distribution, and rows do not depend on each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.generate.sampler import Sampling, choose_tokens
from tests.cases import RULES, mesh_of

NUM_DRAWS = 8192
LOGITS = np.log([0.02, 0.30, 0.05, 0.25, 0.05, 0.13, 0.20], dtype=np.float32)


# One function for all tests: jax compiles it once per shape and mesh.
@functools.partial(jax.jit, static_argnames="num_choices")
def choose(rows, sampling, number, num_choices):
    return choose_tokens(rows, sampling, number, num_choices, RULES)


def draw(
    logits,
    *,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    seeds=range(NUM_DRAWS),
    number=0,
    choices=None,
    mesh=None,
):
    """One token per seed. `logits` is one row for all seeds, or one row per seed."""
    seeds = np.asarray(seeds, np.uint32)
    rows = np.broadcast_to(logits, (len(seeds), np.shape(logits)[-1]))
    column = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), len(seeds))  # noqa: E731
    sampling = Sampling(
        column(temperature, np.float32), column(top_p, np.float32), column(top_k, np.int32), seeds
    )
    mesh = mesh or mesh_of()
    with jax.set_mesh(mesh):
        place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, RULES.spec(*axes)))  # noqa: E731
        rows = place(rows, "batch", "act_vocab")
        sampling = jax.tree.map(lambda x: place(x, "batch"), sampling)
        return np.asarray(choose(rows, sampling, jnp.int32(number), choices or rows.shape[1]))


def check_distribution(tokens, expected):
    """Checks that counts are within five standard deviations, and zero for probability 0."""
    counts = np.bincount(tokens, minlength=len(expected))
    expected = np.asarray(expected) / np.sum(expected)
    deviation = np.sqrt(len(tokens) * expected * (1 - expected))
    assert np.all(np.abs(counts - len(tokens) * expected) <= 5 * deviation), (
        counts / len(tokens),
        expected,
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 6]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_p": 0.01}, [1]),  # The most likely token is always kept.
        ({"top_p": 0.5}, [1, 3]),  # 0.30 + 0.25 reach 0.5.
        ({"top_p": 0.56}, [1, 3, 6]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # Their share of top_k's three is 0.733.
        ({"choices": 4}, [0, 1, 2, 3]),
    ],
)
def test_frequencies_are_the_probabilities_of_what_is_kept(settings, kept):
    probability = np.exp(LOGITS)
    check_distribution(draw(LOGITS, **settings), np.where(np.isin(range(7), kept), probability, 0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_logits_before_the_cut(temperature):
    probability = np.exp(LOGITS / temperature)
    check_distribution(draw(LOGITS, temperature=temperature), probability)
    # At 0.5 the first three have 0.38, 0.26 and 0.17; at 2.0 0.22, 0.20 and 0.18.
    kept = [1, 3] if temperature == 0.5 else [1, 3, 6]
    tokens = draw(LOGITS, temperature=temperature, top_p=0.55)
    check_distribution(tokens, np.where(np.isin(range(7), kept), probability, 0))


def test_of_equal_logits_no_more_than_top_k_are_kept():
    tokens = draw(np.zeros(5, np.float32), top_k=2)
    check_distribution(tokens, [1, 1, 0, 0, 0])


def test_temperature_zero_is_the_likeliest_token_and_so_is_no_sampling_at_all():
    rows = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    np.testing.assert_array_equal(draw(rows, temperature=0.0, seeds=range(64)), rows.argmax(-1))
    with jax.set_mesh(mesh_of()):
        greedy = choose_tokens(jnp.asarray(rows), None, jnp.int32(0), 50, RULES)
    np.testing.assert_array_equal(greedy, rows.argmax(-1))


def test_a_draw_depends_on_its_seed_and_number_alone_not_on_the_batch_nor_the_mesh():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(32, 48)).astype(np.float32)
    seeds = rng.integers(0, 2**32, 32, dtype=np.uint32)
    settings = {"temperature": 0.8, "top_p": 0.9, "number": 3}
    expected = draw(rows, seeds=seeds, **settings)
    order = rng.permutation(32)
    for mesh in (mesh_of(expert=4, tensor=2), mesh_of(data=8)):
        np.testing.assert_array_equal(
            draw(rows[order], seeds=seeds[order], mesh=mesh, **settings), expected[order]
        )
    alone = [draw(rows[i : i + 1], seeds=seeds[i : i + 1], **settings)[0] for i in range(4)]
    np.testing.assert_array_equal(alone, expected[:4])
    assert (draw(rows, seeds=seeds, **settings | {"number": 4}) != expected).any()
    assert (draw(rows, seeds=seeds + 1, **settings) != expected).any()


def test_rows_draw_as_each_was_asked_to():
    rows = np.broadcast_to(LOGITS, (NUM_DRAWS, 7))
    even = np.arange(NUM_DRAWS) % 2 == 0
    tokens = draw(rows, temperature=np.where(even, 0.0, 1.0), top_k=np.where(even, 0, 3))
    assert set(tokens[even]) == {1}
    check_distribution(tokens[~even], [0, 0.30, 0, 0.25, 0, 0, 0.20])
