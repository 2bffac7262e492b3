"""Figures: all that there is to show, with named axes, large enough to read, and the same file for
the same figures.
"""

import dataclasses
import json

import numpy as np
import pytest

from mixtral_jax.lab.pictures.routing import draw_routing, draw_side_by_side
from mixtral_jax.lab.routing.analysis import (
    Flips,
    RoutingAnalysis,
    Saturation,
    find_coactivation,
    find_lift,
    measure_balance,
    pick_layers,
    summarize,
)
from mixtral_jax.lab.routing.analysis_json import from_json
from mixtral_jax.lab.routing.counts import RouteCounts
from mixtral_jax.runs import ablation_routing
from mixtral_jax.runs.ablation_routing import picture_routing
from tests.lab.ablations import small_ablation, write_run

V = 30


def random_analysis(num_layers, num_experts, k):
    """As of random routes: no two counts agree with each other, but all can be drawn."""
    L, E, rng = num_layers, num_experts, np.random.default_rng(0)
    together = rng.integers(1, 9, (L, E, E))
    together[:, 0] = together[:, :, 0] = 0  # An expert that nobody chose.
    together[:, range(E), range(E)] *= 3
    first = rng.integers(0, 90, (L, E))
    counts = RouteCounts(
        tokens=np.uint32(900),
        first_LE=first,
        together_LEE=together,
        neighbours=np.uint32(800),
        same_first_L=rng.integers(0, 800, L),
        any_shared_L=rng.integers(0, 800, L),
        tokens_V=np.full(V, 30),
        first_LVE=rng.integers(0, 4, (L, V, E)),
        tokens_by_label=(np.array([0, 400, 300, 200]),),
        chosen_by_label=(rng.integers(0, 150, (L, 4, E)),),
    )
    flips = Flips("float32", "bfloat16", rng.random(L) / 100, rng.random(L) / 200)
    saturation = Saturation((1_000, 20_000), rng.random((2, L)), k / E)
    names = {
        "part of the source": (
            "code",
            "$a^$ name_with 'marks' that is longer than there is room for",
            "re",
        )
    }
    return summarize(
        counts, k, names, [str(i) for i in range(V)], flips=flips, saturation=saturation
    )


def _is_within(legend, figure):
    figure.draw_without_rendering()
    return (
        figure.bbox.x0 <= legend.get_window_extent().x0
        and legend.get_window_extent().x1 <= figure.bbox.x1
    )


@pytest.mark.parametrize(("num_layers", "num_experts", "k"), [(4, 8, 2), (1, 2, 1), (32, 64, 8)])
def test_every_figure_has_named_axes_words_and_a_width_of_1200_pixels(num_layers, num_experts, k):
    analysis = random_analysis(num_layers, num_experts, k)
    figures = draw_routing(analysis)
    assert [figure.name for figure in figures] == [
        "load_of_experts",
        *(["experts_chosen_together"] if k > 1 else []),
        "repetition_of_consecutive_choices",
        "experts_by_part_of_the_source",
        "experts_by_token",
        "saturation_of_routes",
        "routes_that_rounding_flips",
    ]
    figures += draw_side_by_side(
        {"one, seed 0": analysis, "other, seed 2": analysis}, tokens_per_step=1024
    )
    for figure in figures:
        axes = figure.figure.axes
        assert any(panel.get_xlabel() for panel in axes) and any(
            panel.get_ylabel() for panel in axes
        )
        assert figure.title[0].isupper() and figure.words.endswith(".")
        assert all(_is_within(legend, figure.figure) for legend in figure.figure.legends), (
            figure.name
        )
        data = figure.to_png()
        assert data[:4] == b"\x89PNG" and 1200 <= int.from_bytes(data[16:20], "big") <= 1280


def test_what_is_not_there_is_not_drawn():
    bare = dataclasses.replace(random_analysis(2, 4, 2), by_label=(), flips=None, saturation=None)
    bare = dataclasses.replace(bare, vocabulary=dataclasses.replace(bare.vocabulary, num_ids=0))
    assert len(draw_routing(bare)) == 3


def test_lift_is_one_where_popularity_explains_every_pair_and_shows_the_pair_that_it_does_not():
    weight_E = np.array([1, 2, 4, 9, 0])
    pairs_EE = np.outer(weight_E, weight_E) * 10
    stuck_EE = np.zeros((5, 5), int)
    stuck_EE[0, 3] = stuck_EE[3, 0] = 500
    friends_EE = pairs_EE.copy()
    friends_EE[0, 1] = friends_EE[1, 0] = 300
    together_LEE = np.stack([pairs_EE, stuck_EE, friends_EE])
    together_LEE[:, range(5), range(5)] = 0
    together_LEE[:, range(5), range(5)] = together_LEE.sum(
        -1
    )  # Of two experts a token, each is in one pair.
    analysis = dataclasses.replace(
        random_analysis(3, 5, 2),
        coactivation_LEE=find_coactivation(together_LEE),
        balance=measure_balance(np.diagonal(together_LEE, axis1=1, axis2=2)),
    )
    even_EE, stuck_EE, friends_EE = find_lift(analysis)
    apart = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(even_EE[:4, :4][apart], 1, rtol=1e-6)
    assert np.isnan(even_EE[4]).all() and np.isnan(even_EE[:, 4]).all()
    assert (stuck_EE[0, 3], stuck_EE[3, 0]) == pytest.approx((1, 1))
    assert np.isfinite(stuck_EE).sum() == 2  # Of other pairs, popularity gives none.
    assert (
        friends_EE[0, 1] == pytest.approx(friends_EE[1, 0])
        and friends_EE[0, 1] > 2 > 1 > friends_EE[0, 3]
    )


def test_side_by_side_every_analysis_has_panels_of_what_it_can_say():
    single, paired = (
        random_analysis(4, 8, 1),
        dataclasses.replace(random_analysis(1, 8, 2), saturation=None),
    )
    pictures = draw_side_by_side({"single": single, "paired": paired}, tokens_per_step=1000)
    titles = {
        one.name: [panel.get_title(loc="left") for panel in one.figure.axes] for one in pictures
    }
    assert titles["saturation_of_routes"] == ["single"]
    assert [title for title in titles["experts_chosen_together"] if title] == ["paired, layer 0"]
    assert titles["experts_by_part_of_the_source"] == [
        "single, layer 0",
        "single, layer 3",
        "paired, layer 0",
    ]
    (panel,) = pictures[0].figure.axes
    assert panel.get_xlabel() == "tokens seen (millions)"
    np.testing.assert_array_equal(panel.lines[0].get_xdata(), [1, 20])


def test_the_report_shows_no_router_that_was_not_asked(tmp_path, monkeypatch):
    blind = {
        "router.choice": "hash",
        "router.load_balance.weight": 0.0,
        "router.z_loss_weight": 0.0,
    }
    ablation = small_ablation(arms={"some": {}, "hash": blind}, seeds=(3, 4))
    for run in ablation.runs[1:]:
        write_run(run, tmp_path, loss=4, violation=1)
    monkeypatch.setattr(
        ablation_routing, "_read_kept", lambda run, workdir: random_analysis(1, 4, 2)
    )
    for picture in picture_routing(ablation, tmp_path):
        titles = [panel.get_title(loc="left") for panel in picture.figure.axes]
        assert {title.removesuffix(", layer 0") for title in titles if title} == {"some, seed 4"}
        assert picture.words.endswith('Not shown: "hash", where no router is asked.')


def test_an_analysis_that_was_kept_as_json_draws_the_same_pictures():
    analysis = random_analysis(4, 8, 2)
    kept = from_json(RoutingAnalysis, json.loads(json.dumps(analysis.to_json(), allow_nan=False)))
    assert [type(kept), kept.by_label[0].names] == [RoutingAnalysis, analysis.by_label[0].names]
    for ours, theirs in zip(draw_routing(kept), draw_routing(analysis), strict=True):
        assert (ours.title, ours.words, ours.to_png()) == (
            theirs.title,
            theirs.words,
            theirs.to_png(),
        )
    bare = dataclasses.replace(analysis, flips=None, saturation=None)
    assert from_json(RoutingAnalysis, bare.to_json()).flips is None


def test_equal_figures_are_equal_files():
    first, second = (draw_routing(random_analysis(2, 4, 2))[2].to_png() for _ in range(2))
    assert first == second


def test_layers_shown_are_spread_from_the_first_to_the_last():
    assert (pick_layers(2, 3), pick_layers(32, 3)) == ([0, 1], [0, 16, 31])
