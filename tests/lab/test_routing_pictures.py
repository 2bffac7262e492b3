"""Pictures of a routing analysis: complete, with named axes, large enough, and reproducible."""

import dataclasses
import json

import numpy as np
import pytest

from mixtral_jax.lab.pictures.routing import draw_routing, draw_side_by_side
from mixtral_jax.lab.routing.analysis import (
    Flips,
    RoutingAnalysis,
    Saturation,
    summarize,
)
from mixtral_jax.lab.routing.analysis_json import from_json
from mixtral_jax.lab.routing.counts import RouteCounts
from mixtral_jax.lab.routing.figures import find_coactivation, find_lift, pick_layers
from mixtral_jax.runs import ablation_routing
from mixtral_jax.runs.ablation_routing import picture_routing
from tests.lab.ablations import small_ablation, write_run

V = 30


def random_analysis(num_layers, num_experts, k):
    """An analysis of random counts. They do not fit together, but all of them can be drawn."""
    L, E, rng = num_layers, num_experts, np.random.default_rng(0)
    together = rng.integers(1, 9, (L, E, E))
    together[:, 0] = together[:, :, 0] = 0  # No token chose expert 0.
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


SIZES = [(4, 8, 2), (1, 2, 1), (32, 64, 8)]
each_size = pytest.mark.parametrize(("num_layers", "num_experts", "k"), SIZES)


def _is_within(legend, figure):
    figure.draw_without_rendering()
    return (
        figure.bbox.x0 <= legend.get_window_extent().x0
        and legend.get_window_extent().x1 <= figure.bbox.x1
    )


@each_size
def test_every_picture_has_named_axes_a_caption_and_a_legend_within_it(num_layers, num_experts, k):
    analysis = random_analysis(num_layers, num_experts, k)
    pictures = draw_routing(analysis)
    assert [picture.name for picture in pictures] == [
        "load_of_experts",
        *(["experts_chosen_together"] if k > 1 else []),
        "repetition_of_consecutive_choices",
        "experts_by_part_of_the_source",
        "experts_by_token",
        "saturation_of_routes",
        "routes_that_rounding_flips",
    ]
    analyses = {"one, seed 0": analysis, "other, seed 2": analysis}
    pictures += draw_side_by_side(analyses, tokens_per_step=1024)
    for picture in pictures:
        panels, legends = picture.figure.axes, picture.figure.legends
        assert any(panel.get_xlabel() for panel in panels), picture.name
        assert any(panel.get_ylabel() for panel in panels), picture.name
        assert picture.title[0].isupper() and picture.words.endswith(".")
        assert all(_is_within(legend, picture.figure) for legend in legends), picture.name


def test_every_picture_is_a_png_of_about_1200_pixels():
    for picture in draw_routing(random_analysis(2, 4, 2)):
        data = picture.to_png()
        assert data[:4] == b"\x89PNG" and 1200 <= int.from_bytes(data[16:20], "big") <= 1280


def test_figures_that_are_missing_are_not_drawn():
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
    diagonal = range(5)
    together_LEE[:, diagonal, diagonal] = 0
    chosen_LE = together_LEE.sum(-1)  # Each token has two experts, so each choice is in one pair.
    together_LEE[:, diagonal, diagonal] = chosen_LE
    load_LE = chosen_LE / chosen_LE.sum(-1, keepdims=True)
    coactivation_LEE = find_coactivation(together_LEE)
    even_EE, stuck_EE, friends_EE = find_lift(coactivation_LEE, load_LE, 2, num_tokens=900)
    apart = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(even_EE[:4, :4][apart], 1, rtol=1e-6)
    assert np.isnan(even_EE[4]).all() and np.isnan(even_EE[:, 4]).all()
    assert (stuck_EE[0, 3], stuck_EE[3, 0]) == pytest.approx((1, 1))
    assert np.isfinite(stuck_EE).sum() == 2  # Popularity predicts no other pairs.
    assert friends_EE[0, 1] == pytest.approx(friends_EE[1, 0])
    assert friends_EE[0, 1] > 2 > 1 > friends_EE[0, 3]


def test_side_by_side_every_analysis_has_panels_of_the_figures_that_it_has():
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


def test_the_report_shows_no_router_that_is_not_used(tmp_path, monkeypatch):
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


def test_an_analysis_that_was_kept_as_json_is_the_same_and_draws_the_same_pictures():
    analysis = random_analysis(2, 4, 2)
    kept = from_json(RoutingAnalysis, json.loads(json.dumps(analysis.to_json(), allow_nan=False)))
    assert [type(kept), kept.by_label[0].names] == [RoutingAnalysis, analysis.by_label[0].names]
    assert kept.to_json() == analysis.to_json()
    for ours, theirs in zip(draw_routing(kept), draw_routing(analysis), strict=True):
        assert (ours.title, ours.words) == (theirs.title, theirs.words)
        if ours.name == "experts_chosen_together":  # It has cells without a value.
            assert ours.to_png() == theirs.to_png()
    bare = dataclasses.replace(analysis, flips=None, saturation=None)
    assert from_json(RoutingAnalysis, bare.to_json()).flips is None


def test_equal_figures_are_equal_files():
    first, second = (draw_routing(random_analysis(2, 4, 2))[2].to_png() for _ in range(2))
    assert first == second


def test_layers_shown_are_spread_from_the_first_to_the_last():
    assert (pick_layers(2, 3), pick_layers(32, 3)) == ([0, 1], [0, 16, 31])
