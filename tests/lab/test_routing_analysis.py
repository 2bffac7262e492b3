"""Every figure of a routing analysis against a loop over tokens, on random routing of packed and
padded rows.
"""

import dataclasses
import itertools
import json
import math
import weakref

import jax
import numpy as np
import pytest

from mixtral_jax.kernels.choose import choose_kernels
from mixtral_jax.lab.routing.analysis import (
    RoutedText,
    analyze,
    chance_of_common,
    computing_in,
    measure_balance,
    summarize,
)
from mixtral_jax.lab.routing.counts import count_overlap, count_routes, route
from mixtral_jax.lab.routing.specialization import FEWEST_TOKENS
from mixtral_jax.model.transformer import model_maker
from mixtral_jax.pretrained import Pretrained
from tests.cases import RULES, mesh_of, on_mesh, packed_batch, small_config

L, B, T, E, V = 3, 8, 24, 8, 12
NAMES = {"kind": ("a", "b", "never"), "half": ("first", "second")}
PIECES = [f"piece {token}" for token in range(V)]
MESHES = ({}, {"expert": 4, "fsdp": 2}, {"fsdp": 2, "expert": 2, "tensor": 2})


@dataclasses.dataclass
class Routed:
    """One batch and its routes, on the host."""

    batch: object
    labels: np.ndarray
    experts: np.ndarray


def random_routes(seed, k):
    """Rows of one to three documents, some padded; ids draw experts of their own, so that figures
    are not chance.
    """
    rng = np.random.default_rng(seed)
    batch = packed_batch(small_config(model__vocab_size=V), seed)
    scores = rng.random((L, B, T, E)) + 0.5 * rng.random((L, V, E))[:, batch.tokens[0]]
    labels = np.stack(
        [rng.integers(0, 3, (B, T)), np.broadcast_to(1 + (np.arange(T) >= T // 2), (B, T))]
    )
    return Routed(
        batch, labels.astype(np.int32), np.argsort(-scores, axis=-1)[..., :k].astype(np.int32)
    )


def count(routed, mesh):
    def put(array, *axes):
        return jax.device_put(array, jax.NamedSharding(mesh, RULES.spec(*axes)))

    with jax.set_mesh(mesh):
        placed = [
            (
                on_mesh(r.batch, mesh),
                put(r.labels, None, "batch", None),
                put(r.experts, None, "batch", None, None),
            )
            for r in routed
        ]
        return count_routes(placed, num_experts=E, vocab_size=V, num_labels=[4, 3], rules=RULES)


def real_tokens(routed):
    """The experts of every layer, row and place of each token that is no padding."""
    for r in routed:
        for b, t in np.argwhere(r.batch.segment_ids[0] > 0):
            yield r, b, t, int(r.batch.tokens[0, b, t])


@pytest.fixture(scope="module", params=[2, 3])
def routed(request):
    return [random_routes(seed, request.param) for seed in (0, 1)]


@pytest.fixture(scope="module")
def analysis(routed):
    return summarize(count(routed, mesh_of()), routed[0].experts.shape[-1], NAMES, PIECES)


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_counts_are_the_same_on_every_mesh(routed, sizes):
    here, there = count(routed, mesh_of()), count(routed, mesh_of(**sizes))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert 0 < here.tokens == sum(int((r.batch.segment_ids > 0).sum()) for r in routed) < 2 * B * T


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
    even, collapsed = measure_balance(np.full((1, 4), 7)), measure_balance(np.array([[9, 0, 0, 0]]))
    assert (
        even.coefficient_of_variation_L[0],
        even.load_entropy_L[0],
        even.max_violation_L[0],
    ) == (0, 1, 0)
    assert (collapsed.load_entropy_L[0], collapsed.max_violation_L[0]) == (0, 3)
    assert collapsed.coefficient_of_variation_L[0] == pytest.approx(math.sqrt(3))


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


def test_repetition_looks_at_neighbours_in_a_document_alone(routed, analysis):
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


def test_shares_of_labels_are_those_of_a_loop_and_names_without_a_token_are_left_out(
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


def test_shares_of_tokens_are_those_of_a_loop_over_ids_that_there_are_enough_of(routed, analysis):
    tokens, first = np.zeros(V), np.zeros((L, V, E))
    for r, b, t, token in real_tokens(routed):
        tokens[token] += 1
        first[np.arange(L), token, r.experts[:, b, t, 0]] += 1
    ids = [token for token in range(V) if tokens[token] >= FEWEST_TOKENS]
    vocabulary = analysis.vocabulary
    assert vocabulary.num_ids == len(ids) > 3
    for layer in range(L):
        largest = [max(first[layer, token]) / tokens[token] for token in ids]
        assert vocabulary.share_L[layer] == pytest.approx(sum(largest) / len(ids), rel=1e-12)
        for expert in range(E):
            share = {PIECES[token]: first[layer, token, expert] / tokens[token] for token in ids}
            top = vocabulary.top_tokens[layer][expert]
            assert [t.share for t in top] == sorted((s for s in share.values() if s), reverse=True)[
                :8
            ]
            assert all(
                t.share == share[t.piece] and t.tokens == tokens[PIECES.index(t.piece)] for t in top
            )


def test_ids_that_make_no_difference_have_the_share_of_chance():
    rng = np.random.default_rng(0)
    blind = random_routes(0, 2)
    blind.experts = np.argsort(rng.random((L, B, T, E)), axis=-1)[..., :2].astype(np.int32)
    blind.batch = dataclasses.replace(blind.batch, tokens=blind.batch.tokens % 4)
    vocabulary = summarize(count([blind] * 1, mesh_of()), 2, NAMES, PIECES).vocabulary
    assert vocabulary.num_ids == 4
    np.testing.assert_allclose(vocabulary.share_L, vocabulary.chance_L, atol=0.08)
    assert all(vocabulary.chance_L > 1.3 / E)


def test_agreement_of_two_models_is_about_sets_and_not_their_order(routed):
    one, other = routed[0], random_routes(5, routed[0].experts.shape[-1])
    other.experts[0] = one.experts[0][..., ::-1]
    mesh = mesh_of(expert=4, fsdp=2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(
                x.experts, jax.NamedSharding(mesh, RULES.spec(None, "batch", None, None))
            )
            for x in (one, other)
        ]
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


def load(mesh, **overrides):
    """A model as `load_pretrained` gives it, with the weights of its seed."""
    config = small_config(**overrides)
    kernels = choose_kernels(config, "cpu")
    with jax.set_mesh(mesh):
        model = jax.jit(model_maker(config, kernels))()
    return Pretrained(config, model, None, mesh, kernels)


def text_of(loaded):
    """Six batches without labels, of which never more than three are held."""

    def batches():
        made = []
        for seed in range(6):
            batch = on_mesh(packed_batch(loaded.config, seed), loaded.mesh)
            made.append(weakref.ref(batch.tokens))
            assert sum(ref() is not None for ref in made) <= 3
            yield batch

    with jax.set_mesh(loaded.mesh):
        none = jax.device_put(
            np.zeros((0, B, T), np.int32), jax.NamedSharding(loaded.mesh, RULES.spec(None, "batch"))
        )
    return RoutedText(batches, [none] * 6, {}, [str(token) for token in range(96)])


def test_an_analysis_of_a_model_is_the_same_on_every_mesh_and_says_how_it_was_compared():
    analyses = []
    for sizes in MESHES[:2]:
        loaded = load(mesh_of(**sizes))
        text = text_of(loaded)
        earlier = {
            step: lambda seed=step, mesh=loaded.mesh: load(mesh, train__seed=seed % 20)
            for step in (20, 10)
        }
        analyses.append(analyze(loaded, text, earlier=earlier))
        with jax.set_mesh(loaded.mesh):
            half = [
                np.asarray(route(computing_in(loaded, "bfloat16"), b, "bfloat16"))
                for b in text.batches()
            ]
            full = [np.asarray(route(loaded.model, b, "float32")) for b in text.batches()]
        changed, tokens = np.zeros(2), 0
        for batch, one, other in zip(text.batches(), half, full, strict=True):
            is_real = np.asarray(batch.segment_ids[0]) > 0
            tokens += is_real.sum()
            changed += (np.sort(one) != np.sort(other)).any(-1)[:, is_real].sum(-1)
        flips = analyses[-1].flips
        assert (flips.dtype, flips.other_dtype) == ("float32", "bfloat16")
        np.testing.assert_allclose(flips.any_L, changed / tokens, rtol=1e-12)
        assert 0 < flips.any_L.max() < 0.5
    one, other = ({k: v for k, v in a.to_json().items() if k != "flips"} for a in analyses)
    assert one == other
    saturation = analyses[0].saturation
    assert saturation.steps == (10, 20) and saturation.chance == 2 / 8
    np.testing.assert_array_equal(saturation.share_SL[1], 1)  # Seed 0: the model itself.
    assert (saturation.share_SL[0] < 0.6).all()


def test_json_holds_every_figure_without_its_dimensions_and_null_for_what_is_not_there(analysis):
    said = json.loads(json.dumps(analysis.to_json(), allow_nan=False))
    assert np.asarray(said["balance"]["load"]).shape == (L, E)
    assert (
        said["coactivation"][0][1][1] is None
        and said["flips"] is None
        and said["saturation"] is None
    )
    assert said["by_label"][0]["share"][2] == analysis.by_label[0].share_LXE[2].tolist()
