"""Every figure of a routing analysis against a loop over tokens, on random routes."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from mixtral_jax.lab.routing.analysis import summarize
from mixtral_jax.lab.routing.counts import count_overlap
from mixtral_jax.lab.routing.figures import chance_of_common, measure_balance
from mixtral_jax.lab.routing.specialization import MIN_TOKENS_PER_ID
from tests.cases import RULES, mesh_of, on_mesh
from tests.lab.routes import (
    NAMES,
    PIECES,
    B,
    E,
    L,
    T,
    V,
    count,
    random_routes,
    real_tokens,
)

MESHES = ({"expert": 4, "fsdp": 2}, {"fsdp": 2, "expert": 2, "tensor": 2})


@pytest.fixture(scope="module", params=[2, 3])
def routed(request):
    return [random_routes(seed, request.param) for seed in (0, 1)]


@pytest.fixture(scope="module")
def counts(routed):
    return count(routed, mesh_of())


@pytest.fixture(scope="module")
def analysis(routed, counts):
    return summarize(counts, routed[0].experts.shape[-1], NAMES, PIECES)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_counts_are_the_same_on_every_mesh(routed, counts, sizes):
    jax.tree.map(np.testing.assert_array_equal, counts, count(routed, mesh_of(**sizes)))
    assert (
        0 < counts.tokens == sum(int((r.batch.segment_ids > 0).sum()) for r in routed) < 2 * B * T
    )


def test_balance_is_that_of_a_loop(routed, analysis):
    load = np.zeros((L, E))
    for r, b, t, _ in real_tokens(routed):
        for layer in range(L):
            load[layer, r.experts[layer, b, t]] += 1
    for layer in range(L):
        share = load[layer] / load[layer].sum()
        mean = sum(share) / E
        spread = math.sqrt(sum((s - mean) ** 2 for s in share) / E)
        balance = analysis.balance
        np.testing.assert_allclose(balance.load_LE[layer], share, rtol=1e-12)
        assert balance.coefficient_of_variation_L[layer] == pytest.approx(spread / mean, rel=1e-12)
        entropy = -sum(s * math.log(s) for s in share) / math.log(E)
        assert balance.load_entropy_L[layer] == pytest.approx(entropy, rel=1e-12)
        assert balance.max_violation_L[layer] == pytest.approx(max(share) / mean - 1, rel=1e-12)


def test_balance_takes_its_stated_values_when_even_and_when_collapsed():
    even = measure_balance(np.full((1, 4), 7))
    assert (even.coefficient_of_variation_L[0], even.max_violation_L[0]) == (0, 0)
    assert even.load_entropy_L[0] == 1
    collapsed = measure_balance(np.array([[9, 0, 0, 0]]))
    assert (collapsed.load_entropy_L[0], collapsed.max_violation_L[0]) == (0, 3)
    assert collapsed.coefficient_of_variation_L[0] == pytest.approx(math.sqrt(3))


def test_balance_of_counts_that_float32_cannot_hold_is_exact():
    large = 2**30 + 1
    balance = measure_balance(np.array([[large, large - 1]], np.uint32))
    assert balance.load_LE[0, 0] - balance.load_LE[0, 1] == pytest.approx(1 / (2 * large - 1))
    assert balance.max_violation_L[0] == pytest.approx(1 / (2 * large - 1), rel=1e-5)


def test_coactivation_counts_all_pairs_of_a_tokens_experts(routed, analysis):
    chosen, both = np.zeros((L, E)), np.zeros((L, E, E))
    for r, b, t, _ in real_tokens(routed):
        for layer in range(L):
            experts = r.experts[layer, b, t]
            chosen[layer, experts] += 1
            for i, j in itertools.permutations(experts, 2):
                both[layer, i, j] += 1
    expected = both / chosen[..., None]
    expected[:, np.eye(E, dtype=bool)] = np.nan
    np.testing.assert_allclose(analysis.coactivation_LEE, expected, rtol=1e-12)
    k = routed[0].experts.shape[-1]
    np.testing.assert_allclose(np.nansum(analysis.coactivation_LEE, axis=-1), k - 1, rtol=1e-12)


def test_repetition_counts_neighbours_within_a_document_only(routed, analysis):
    pairs, same, common, first = 0, np.zeros(L), np.zeros(L), np.zeros((L, E))
    for r, b, t, _ in real_tokens(routed):
        first[np.arange(L), r.experts[:, b, t, 0]] += 1
        segments = r.batch.segment_ids[0, b]
        if t + 1 == T or segments[t + 1] != segments[t]:
            continue
        pairs += 1
        for layer in range(L):
            here, after = r.experts[layer, b, t].tolist(), r.experts[layer, b, t + 1].tolist()
            same[layer] += here[0] == after[0]
            common[layer] += bool(set(here) & set(after))
    repetition = analysis.repetition
    assert repetition.num_pairs == pairs
    np.testing.assert_allclose(repetition.first_L, same / pairs, rtol=1e-12)
    np.testing.assert_allclose(repetition.any_L, common / pairs, rtol=1e-12)
    shares = first / first.sum(-1, keepdims=True)
    np.testing.assert_allclose(repetition.chance_first_of_load_L, (shares**2).sum(-1), rtol=1e-12)
    assert repetition.chance_first == 1 / E


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (6, 3), (5, 1), (4, 4), (4, 3)])
def test_chance_of_a_common_expert_is_that_over_all_pairs_of_choices(num_experts, k):
    choices = list(itertools.combinations(range(num_experts), k))
    common = [bool(set(one) & set(other)) for one in choices for other in choices]
    assert chance_of_common(num_experts, k) == pytest.approx(sum(common) / len(common), rel=1e-12)


def test_chance_of_mixtral_is_that_of_its_paper():
    assert round(chance_of_common(8, 2), 2) == 0.46


def test_shares_of_labels_are_those_of_a_loop_and_labels_without_tokens_are_left_out(
    routed, analysis
):
    kind, half = analysis.by_label
    assert (kind.title, kind.names, half.names) == ("kind", ("a", "b"), ("first", "second"))
    for number, shares in enumerate((kind, half)):
        tokens, chosen = np.zeros(2), np.zeros((L, 2, E))
        for r, b, t, _ in real_tokens(routed):
            if label := r.labels[number, b, t]:
                tokens[label - 1] += 1
                for layer in range(L):
                    chosen[layer, label - 1, r.experts[layer, b, t]] += 1
        np.testing.assert_array_equal(shares.tokens_X, tokens)
        np.testing.assert_allclose(shares.share_LXE, chosen / tokens[:, None], rtol=1e-12)
        np.testing.assert_allclose(shares.of_all_LE, chosen.sum(1) / tokens.sum(), rtol=1e-12)
        assert shares.uniform == routed[0].experts.shape[-1] / E


def test_shares_of_ids_are_those_of_a_loop_over_frequent_ids(routed, analysis):
    tokens, first = np.zeros(V), np.zeros((L, V, E))
    for r, b, t, token in real_tokens(routed):
        tokens[token] += 1
        first[np.arange(L), token, r.experts[:, b, t, 0]] += 1
    ids = [token for token in range(V) if tokens[token] >= MIN_TOKENS_PER_ID]
    vocabulary = analysis.vocabulary
    assert vocabulary.num_ids == len(ids) > 3
    for layer in range(L):
        largest = [max(first[layer, token]) / tokens[token] for token in ids]
        assert vocabulary.share_L[layer] == pytest.approx(sum(largest) / len(ids), rel=1e-12)
        for expert in range(E):
            share = {PIECES[token]: first[layer, token, expert] / tokens[token] for token in ids}
            top = vocabulary.top_tokens[layer][expert]
            positive = sorted((s for s in share.values() if s), reverse=True)
            assert [token.share for token in top] == positive[:8]
            for token in top:
                assert token.share == share[token.piece]
                assert token.tokens == tokens[PIECES.index(token.piece)]


def test_ids_that_do_not_matter_have_the_share_of_chance():
    rng = np.random.default_rng(0)
    blind = random_routes(0, 2)
    blind.experts = np.argsort(rng.random((L, B, T, E)), axis=-1)[..., :2].astype(np.int32)
    blind.batch = dataclasses.replace(blind.batch, tokens=blind.batch.tokens % 4)
    vocabulary = summarize(count([blind], mesh_of()), 2, NAMES, PIECES).vocabulary
    assert vocabulary.num_ids == 4
    np.testing.assert_allclose(vocabulary.share_L, vocabulary.chance_L, atol=0.08)
    assert all(vocabulary.chance_L > 1.3 / E)


def test_agreement_of_two_models_ignores_the_order_of_experts(routed):
    one, other = routed[0], random_routes(5, routed[0].experts.shape[-1])
    other.experts[0] = one.experts[0][..., ::-1]
    mesh = mesh_of(expert=4, fsdp=2)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, RULES.spec(None, "batch", None, None))
        placed = [jax.device_put(x.experts, sharding) for x in (one, other)]
        overlap = count_overlap([(on_mesh(one.batch, mesh), *placed)])
    common, same, first = np.zeros((3, L))
    for r, b, t, _ in real_tokens([one]):
        for layer in range(L):
            here, there = (x.experts[layer, b, t].tolist() for x in (r, other))
            common[layer] += len(set(here) & set(there))
            same[layer] += set(here) == set(there)
            first[layer] += here[0] == there[0]
    assert same[0] == overlap.tokens
    for got, expected in (
        (overlap.common_L, common),
        (overlap.same_set_L, same),
        (overlap.same_first_L, first),
    ):
        np.testing.assert_array_equal(got, expected)


def test_json_names_figures_without_dimensions_and_has_null_for_missing_ones(analysis):
    figures = json.loads(json.dumps(analysis.to_json(), allow_nan=False))
    assert np.asarray(figures["balance"]["load"]).shape == (L, E)
    assert figures["coactivation"][0][1][1] is None
    assert figures["flips"] is None and figures["saturation"] is None
    assert figures["by_label"][0]["share"][2] == analysis.by_label[0].share_LXE[2].tolist()
