"""Pictures of a `RoutingAnalysis`, with a line of plain words each."""

import textwrap
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from mixtral_jax.lab.pictures.routing_axes import (
    CHANCE,
    HEAT,
    add_ratio_scale,
    add_scale,
    draw_chance,
    draw_ratios,
    mark_layers,
    mark_shares,
    write_numbers,
)
from mixtral_jax.lab.pictures.style import (
    COLOURS,
    Picture,
    add_legend,
    in_style,
    make_figure,
    make_grid,
    scale_of,
)
from mixtral_jax.lab.routing.analysis import FEWEST_PAIRS, RoutingAnalysis, find_lift, pick_layers
from mixtral_jax.lab.routing.specialization import LabelShares

# By what their panels shall be called; the name of one that stands alone is empty.
Analyses = Mapping[str, RoutingAnalysis]

# Of layers of one analysis with a panel each; of panels side by side; of experts with a bar for
# each name; of cells with a number in each; of lines in a plot.
_MOST_LAYERS, _MOST_COLUMNS, _MOST_BARRED, _MOST_NUMBERED, _MOST_LINES = 3, 4, 16, 16, 8


def draw_routing(analysis: RoutingAnalysis) -> list[Picture]:
    """All that there is something to draw for."""
    alone = {"": analysis}
    pictures = [draw_load(analysis)]
    if analysis.num_experts_per_token > 1:
        pictures.append(draw_coactivation(alone))
    pictures.append(draw_repetition(analysis))
    pictures += [draw_label(alone, number) for number in range(len(analysis.by_label))]
    if analysis.vocabulary.num_ids:
        pictures.append(draw_vocabulary(analysis))
    if analysis.saturation:
        pictures.append(draw_saturation(alone))
    if analysis.flips:
        pictures.append(draw_flips(analysis))
    return pictures


def draw_side_by_side(analyses: Analyses, tokens_per_step: int) -> list[Picture]:
    """How early routes settled, who is chosen together, who is for what: one picture each, of those
    that can say.
    """
    settled = {name: one for name, one in analyses.items() if one.saturation}
    paired = {name: one for name, one in analyses.items() if one.num_experts_per_token > 1}
    labelled = {name: one for name, one in analyses.items() if one.by_label}
    pictures = [draw_saturation(settled, tokens_per_step)] if settled else []
    pictures += [draw_coactivation(paired)] if paired else []
    return pictures + ([draw_label(labelled, 0)] if labelled else [])


@in_style
def draw_load(analysis: RoutingAnalysis) -> Picture:
    """A cell for each expert of each layer."""
    E, L, load_LE = analysis.num_experts, analysis.num_layers, analysis.balance.load_LE
    figure, (panel,) = make_figure(1, min(2.4 + 0.5 * L, 8.5))
    highest = max(2 / E, float(load_LE.max()))
    image = panel.imshow(load_LE, cmap=HEAT, vmin=0, vmax=highest, aspect="auto")
    panel.grid(False)
    mark_layers(panel, L, vertical=True)
    panel.set_xlabel("expert")
    if E <= _MOST_NUMBERED and L <= _MOST_NUMBERED:
        write_numbers(panel, load_LE, highest)
        panel.set_xticks(range(E))
    add_scale(figure, image, panel, f"share of routes (even: {1 / E:.1%})")
    words = (
        f"Which share of all routes each expert gets. Even loads are {1 / E:.1%} everywhere; a "
        "dark cell is an expert "
        "that does much of its layer's work, a pale one is hardly used."
    )
    return Picture("Load of experts", words, figure)


@in_style
def draw_coactivation(analyses: Analyses) -> Picture:
    """A map of pairs for a few layers of each."""
    shown = _list_panels(analyses)
    columns = min(len(shown), _MOST_COLUMNS)
    figure, panels = make_grid(len(shown), columns, min(4.6, 11.5 / columns))
    for panel, (title, analysis, layer) in zip(panels, shown, strict=True):
        draw_ratios(panel, find_lift(analysis)[layer])
        panel.set_title(title, loc="left")
        if analysis.num_experts <= _MOST_NUMBERED:
            panel.set(xticks=range(analysis.num_experts), yticks=range(analysis.num_experts))
        panel.set_xlabel("chosen with expert")
    for panel in panels[::columns]:
        panel.set_ylabel("expert")
    add_ratio_scale(figure, panels, "how often both, relative to what popularity alone gives")
    words = (
        "How often two experts are chosen for one token, over all pairs of a token's experts, "
        "relative to what their "
        "popularity alone gives: 1 (white) is as often as if a choice did not look at the others, "
        "2 twice as often. "
        f"Grey: an expert with itself, and pairs of under {FEWEST_PAIRS} tokens, both as chosen "
        "and by popularity."
    )
    return Picture("Experts chosen together", words, figure)


@in_style
def draw_repetition(analysis: RoutingAnalysis) -> Picture:
    """By layer, against chance."""
    repetition, k = analysis.repetition, analysis.num_experts_per_token
    any_name = "first or second choice" if k == 2 else f"any of {k} choices"
    figure, (panel,) = make_figure(1, 4.6)
    layers = range(analysis.num_layers)
    top = max(float(np.nanmax(repetition.any_L, initial=0)), repetition.chance_any)
    if k > 1:
        panel.plot(layers, repetition.any_L, marker="o", color=COLOURS[0], label=any_name)
        draw_chance(panel, repetition.chance_any, f"{any_name}, by chance", COLOURS[0])
    panel.plot(layers, repetition.first_L, marker="s", color=COLOURS[1], label="first choice")
    draw_chance(panel, repetition.chance_first, "first choice, by chance", COLOURS[1])
    panel.plot(
        layers,
        repetition.chance_first_of_load_L,
        color=COLOURS[1],
        linestyle=":",
        label="first choice, if independent of the token before",
    )
    mark_layers(panel, analysis.num_layers)
    mark_shares(panel, "pairs of consecutive tokens", top=1.1 * top)
    add_legend(figure, panel)
    words = (
        "How often two consecutive tokens of a document have the same first choice, or share any "
        "expert "
        f"(as in Table 5 of the Mixtral paper), over {repetition.num_pairs:,} pairs. Dashed: "
        "experts drawn at random. "
        "Above the dotted line, routing follows the text and not just the experts' popularity."
    )
    return Picture("Repetition of consecutive choices", words, figure)


@in_style
def draw_label(analyses: Analyses, number: int) -> Picture:
    """Bars of each expert for the kinds of a labelling, for a few layers of each analysis."""
    shown = _list_panels(analyses)
    columns, height = (1, 3.0) if len(analyses) == 1 else (2, 2.4)
    figure, panels = make_grid(len(shown), columns, height, sharey=True)
    for panel, (title, analysis, layer) in zip(panels, shown, strict=True):
        _draw_bars(panel, analysis.by_label[number], layer)
        panel.set_title(title, loc="left")
        panel.set_xlabel("expert")
    mark_shares(panels[0], "tokens that choose it")
    add_legend(figure, *panels)
    shares = [analysis.by_label[number] for analysis in analyses.values()]
    is_cut = any(each.share_LXE.shape[-1] > _MOST_BARRED for each in shares)
    words = (
        f"Of the tokens of each {shares[0].title}, the share that choose an expert. Dashed: if it "
        "made no difference "
        "and loads were even. Bars of one expert that differ show what it is for."
        + (f" Shown are the {_MOST_BARRED} experts that differ most." if is_cut else "")
    )
    return Picture(f"Experts by {shares[0].title}", words, figure)


@in_style
def draw_vocabulary(analysis: RoutingAnalysis) -> Picture:
    """By layer, against chance."""
    vocabulary = analysis.vocabulary
    figure, (panel,) = make_figure(1, 4.2)
    layers = range(analysis.num_layers)
    panel.plot(layers, vocabulary.share_L, marker="o", color=COLOURS[0], label="measured")
    panel.plot(layers, vocabulary.chance_L, label="if ids made no difference", **CHANCE)
    mark_layers(panel, analysis.num_layers)
    mark_shares(panel, "tokens of an id with its main expert", top=1.05)
    add_legend(figure, panel)
    words = (
        "How far a token's id alone decides its first choice: of the tokens of one id, the share "
        "that go to that id's "
        f"most frequent expert, averaged over the {vocabulary.num_ids:,} ids with at least "
        f"{vocabulary.fewest_tokens} "
        "tokens. 100%: the expert could be looked up in a table."
    )
    return Picture("Experts by token", words, figure)


@in_style
def draw_saturation(analyses: Analyses, tokens_per_step: int | None = None) -> Picture:
    """A line for each of some layers, over steps, or over tokens where it is said how many are in
    one.
    """
    figure, panels = make_grid(
        len(analyses), _MOST_COLUMNS, 4.2 if len(analyses) == 1 else 3.0, sharey=True
    )
    for panel, (name, analysis) in zip(panels, analyses.items(), strict=True):
        _draw_settling(panel, analysis, tokens_per_step)
        panel.set_title(name, loc="left")
    mark_shares(panels[0], "experts that the last\ncheckpoint chooses too", top=1.05)
    add_legend(figure, *panels)
    words = (
        "How early routes settle: the share of a token's experts at an earlier step that the last "
        "checkpoint chooses "
        "too (router saturation, OLMoE). A layer near 100% has stopped changing its mind."
    )
    return Picture("Saturation of routes", words, figure)


@in_style
def draw_flips(analysis: RoutingAnalysis) -> Picture:
    """By layer."""
    flips = analysis.flips
    assert flips is not None
    figure, (panel,) = make_figure(1, 4.2)
    layers = range(analysis.num_layers)
    panel.plot(layers, flips.any_L, marker="o", color=COLOURS[0], label="the set of its experts")
    panel.plot(layers, flips.first_L, marker="s", color=COLOURS[1], label="its first choice")
    mark_layers(panel, analysis.num_layers)
    mark_shares(
        panel,
        "tokens that change",
        top=max(0.01, 1.2 * float(max(flips.any_L.max(), flips.first_L.max()))),
    )
    add_legend(figure, panel)
    words = (
        "The share of tokens whose experts change when the same weights compute in "
        f"{flips.other_dtype} instead of "
        f"{flips.dtype}. Changes add up from layer to layer, since each layer sees what the ones "
        "before made of it."
    )
    return Picture("Routes that rounding flips", words, figure)


def _list_panels(analyses: Analyses) -> list[tuple[str, RoutingAnalysis, int]]:
    """Title, analysis and layer of each panel; of several analyses, fewer layers."""
    most = _MOST_LAYERS if len(analyses) == 1 else 2
    return [
        (f"{name}, layer {layer}" if name else f"layer {layer}", analysis, layer)
        for name, analysis in analyses.items()
        for layer in pick_layers(analysis.num_layers, most)
    ]


def _draw_settling(panel: Axes, analysis: RoutingAnalysis, tokens_per_step: int | None) -> None:
    saturation = analysis.saturation
    assert saturation is not None
    place_S = np.array(saturation.steps) * (tokens_per_step or 1)
    size, unit = scale_of(place_S.max()) if tokens_per_step else (1, "")
    layers = pick_layers(analysis.num_layers, _MOST_LINES)
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, color in zip(layers, colors, strict=True):
        panel.plot(
            place_S / size,
            saturation.share_SL[:, layer],
            marker="o",
            color=color,
            label=f"layer {layer}",
        )
    draw_chance(panel, saturation.chance, "by chance")
    panel.set_xlabel(f"tokens seen{unit}" if tokens_per_step else "step of the earlier checkpoint")
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_bars(panel: Axes, shares: LabelShares, layer: int) -> None:
    share_XE = shares.share_LXE[layer]
    X, E = share_XE.shape
    experts = np.arange(E)
    if E > _MOST_BARRED:
        experts = np.sort(np.argsort(-np.ptp(share_XE, axis=0), kind="stable")[:_MOST_BARRED])
    width = 0.8 / X
    for number, name in enumerate(shares.names):
        places = np.arange(len(experts)) - 0.4 + (number + 0.5) * width
        label = (
            f"{textwrap.shorten(name, 24, placeholder='...')} ({shares.tokens_X[number]:,} tokens)"
        )
        panel.bar(
            places,
            share_XE[number, experts],
            width,
            color=COLOURS[number % len(COLOURS)],
            label=label,
        )
    draw_chance(panel, shares.uniform, "uniform")
    panel.set_xticks(np.arange(len(experts)), labels=[str(expert) for expert in experts])
    panel.grid(False, axis="x")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
