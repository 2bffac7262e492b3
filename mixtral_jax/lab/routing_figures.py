"""Figures of a `RoutingAnalysis`, with a line of plain words each."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from mixtral_jax.lab.figures import CHANCE, HEAT, draw, mark_layers, mark_shares, shade
from mixtral_jax.lab.routing_analysis import RoutingAnalysis, pick_layers
from mixtral_jax.lab.specialization import LabelShares
from mixtral_jax.lab.style import COLOURS, Picture

# Of layers side by side; of experts with a bar for each name; of cells with a number in each; of lines in a plot.
_MOST_PANELS, _MOST_BARRED, _MOST_NUMBERED, _MOST_LINES = 3, 16, 16, 8


def make_figures(analysis: RoutingAnalysis) -> list[Picture]:
    """All that there is something to draw for."""
    figures = [draw_load(analysis), draw_coactivation(analysis), draw_repetition(analysis)]
    figures += [draw_label(analysis, shares) for shares in analysis.by_label]
    if analysis.vocabulary.num_ids:
        figures.append(draw_vocabulary(analysis))
    if analysis.saturation:
        figures.append(draw_saturation(analysis))
    if analysis.flips:
        figures.append(draw_flips(analysis))
    return figures


def draw_load(analysis: RoutingAnalysis) -> Picture:
    """A cell for each expert of each layer."""
    E, L, load_LE = analysis.num_experts, analysis.num_layers, analysis.balance.load_LE

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        highest = max(2 / E, float(load_LE.max()))
        image = axes.imshow(load_LE, cmap=HEAT, vmin=0, vmax=highest, aspect="auto")
        axes.grid(False)
        mark_layers(axes, L, vertical=True)
        axes.set_xlabel("expert")
        if E <= _MOST_NUMBERED and L <= _MOST_NUMBERED:
            _write_numbers(axes, load_LE, highest)
            axes.set_xticks(range(E))
        _add_scale(drawing, image, axes, f"share of routes (even: {1 / E:.1%})")

    words = (
        f"Which share of all routes each expert gets. Even loads are {1 / E:.1%} everywhere; a dark cell is an expert "
        "that does much of its layer's work, a pale one is hardly used."
    )
    return draw("Load of experts", words, paint, height=min(2.4 + 0.5 * L, 8.5))


def draw_coactivation(analysis: RoutingAnalysis) -> Picture:
    """A map of pairs for a few layers."""
    E, k = analysis.num_experts, analysis.num_experts_per_token
    layers = pick_layers(analysis.num_layers, _MOST_PANELS)
    chance = (k - 1) / max(E - 1, 1)
    highest = max(2 * chance, float(np.nanmax(analysis.coactivation_LEE[layers], initial=0)), 1e-9)

    def paint(drawing: Figure) -> None:
        panels = drawing.subplots(1, len(layers), squeeze=False)[0]
        image = None
        for axes, layer in zip(panels, layers, strict=True):
            colors = mpl.colormaps[HEAT].with_extremes(bad="#dddddd")
            pairs_EE = analysis.coactivation_LEE[layer]
            image = axes.imshow(np.ma.masked_invalid(pairs_EE), cmap=colors, vmin=0, vmax=highest)
            axes.grid(False)
            axes.set(title=f"layer {layer}", xlabel="also chosen: expert j")
            if E <= _MOST_NUMBERED:
                axes.set(xticks=range(E), yticks=range(E))
        assert image is not None
        panels[0].set_ylabel("chosen: expert i")
        _add_scale(drawing, image, panels, f"P(j | i) (by chance {chance:.1%})")

    words = (
        "Of the tokens that choose expert i, the share that also choose expert j, over all pairs of a token's "
        f"{k} experts. By chance it is {chance:.1%}; dark pairs work together, pale ones hardly ever. "
        "Grey: itself, or never chosen."
    )
    return draw("Experts chosen together", words, paint, height=4.6)


def draw_repetition(analysis: RoutingAnalysis) -> Picture:
    """By layer, against chance."""
    repetition, k = analysis.repetition, analysis.num_experts_per_token
    any_name = "first or second choice" if k == 2 else f"any of {k} choices"

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        layers = range(analysis.num_layers)
        top = max(float(np.nanmax(repetition.any_L, initial=0)), repetition.chance_any)
        if k > 1:
            axes.plot(layers, repetition.any_L, marker="o", color=COLOURS[0], label=any_name)
            _draw_chance(axes, repetition.chance_any, f"{any_name}, by chance", COLOURS[0])
        axes.plot(layers, repetition.first_L, marker="s", color=COLOURS[1], label="first choice")
        _draw_chance(axes, repetition.chance_first, "first choice, by chance", COLOURS[1])
        axes.plot(
            layers, repetition.chance_first_of_load_L, color=COLOURS[1], linestyle=":",
            label="first choice, if independent of the token before",
        )  # fmt: skip
        mark_layers(axes, analysis.num_layers)
        mark_shares(axes, "pairs of consecutive tokens", top=1.1 * top)
        drawing.legend(loc="outside lower center", ncols=2)

    words = (
        "How often two consecutive tokens of a document have the same first choice, or share any expert "
        f"(as in Table 5 of the Mixtral paper), over {repetition.num_pairs:,} pairs. Dashed: experts drawn at random. "
        "Above the dotted line, routing follows the text and not just the experts' popularity."
    )
    return draw("Repetition of consecutive choices", words, paint)


def draw_label(analysis: RoutingAnalysis, shares: LabelShares) -> Picture:
    """Bars of each expert, for a few layers one below the other."""
    layers = pick_layers(analysis.num_layers, _MOST_PANELS)

    def paint(drawing: Figure) -> None:
        panels = drawing.subplots(len(layers), 1, squeeze=False, sharey=True)[:, 0]
        for axes, layer in zip(panels, layers, strict=True):
            _paint_bars(axes, shares, layer)
            axes.set_title(f"layer {layer}", loc="left")
        panels[-1].set_xlabel("expert")
        mark_shares(panels[len(layers) // 2], "tokens of a kind that choose it")
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    shown = "" if analysis.num_experts <= _MOST_BARRED else f" Shown are the {_MOST_BARRED} experts that differ most."
    words = (
        f"Of the tokens of each {shares.title}, the share that choose an expert. Dashed: {shares.uniform:.1%}, if it "
        f"made no difference and loads were even. Bars of one expert that differ show what it is for.{shown}"
    )
    return draw(f"Experts by {shares.title}", words, paint, height=2 + 2.4 * len(layers))


def draw_vocabulary(analysis: RoutingAnalysis) -> Picture:
    """By layer, against chance."""
    vocabulary = analysis.vocabulary

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        layers = range(analysis.num_layers)
        axes.plot(layers, vocabulary.share_L, marker="o", color=COLOURS[0], label="measured")
        axes.plot(layers, vocabulary.chance_L, label="if ids made no difference", **CHANCE)
        mark_layers(axes, analysis.num_layers)
        mark_shares(axes, "tokens of an id with its main expert", top=1.05)
        axes.legend(loc="upper right")

    words = (
        "How far a token's id alone decides its first choice: of the tokens of one id, the share that go to that id's "
        f"most frequent expert, averaged over the {vocabulary.num_ids:,} ids with at least {vocabulary.fewest_tokens} "
        "tokens. 100%: the expert could be looked up in a table."
    )
    return draw("Experts by token", words, paint, height=4.9)


def draw_saturation(analysis: RoutingAnalysis) -> Picture:
    """A line for each of some layers, over steps."""
    saturation = analysis.saturation
    assert saturation is not None
    layers = pick_layers(analysis.num_layers, _MOST_LINES)

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
        for layer, color in zip(layers, colors, strict=True):
            axes.plot(saturation.steps, saturation.share_SL[:, layer], marker="o", color=color, label=f"layer {layer}")
        _draw_chance(axes, saturation.chance, "by chance")
        axes.set_xlabel("step of the earlier checkpoint")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        mark_shares(axes, "experts that the last checkpoint chooses too", top=1.05)
        axes.legend(loc="lower right", ncols=3)

    words = (
        "How early routes settle: the share of a token's experts at an earlier step that the last checkpoint chooses "
        "too (router saturation, OLMoE). A layer near 100% has stopped changing its mind."
    )
    return draw("Saturation of routes", words, paint)


def draw_flips(analysis: RoutingAnalysis) -> Picture:
    """By layer."""
    flips = analysis.flips
    assert flips is not None

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        layers = range(analysis.num_layers)
        axes.plot(layers, flips.any_L, marker="o", color=COLOURS[0], label="any of its experts")
        axes.plot(layers, flips.first_L, marker="s", color=COLOURS[1], label="its first choice")
        mark_layers(axes, analysis.num_layers)
        mark_shares(axes, "tokens that change", top=max(0.01, 1.2 * float(flips.any_L.max())))
        axes.legend(loc="upper left")

    words = (
        f"The share of tokens whose experts change when the same weights compute in {flips.other_dtype} instead of "
        f"{flips.dtype}. Changes add up from layer to layer, since each layer sees what the ones before made of it."
    )
    return draw("Routes that rounding flips", words, paint, height=4.6)


def _paint_bars(axes: Axes, shares: LabelShares, layer: int) -> None:
    share_XE = shares.share_LXE[layer]
    X, E = share_XE.shape
    experts = np.arange(E)
    if E > _MOST_BARRED:
        experts = np.sort(np.argsort(-np.ptp(share_XE, axis=0), kind="stable")[:_MOST_BARRED])
    width = 0.8 / X
    for number, name in enumerate(shares.names):
        places = np.arange(len(experts)) - 0.4 + (number + 0.5) * width
        label = f"{textwrap.shorten(name, 24, placeholder='...')} ({shares.tokens_X[number]:,} tokens)"
        axes.bar(places, share_XE[number, experts], width, color=COLOURS[number % len(COLOURS)], label=label)
    _draw_chance(axes, shares.uniform, "uniform")
    axes.set_xticks(np.arange(len(experts)), labels=[str(expert) for expert in experts])
    axes.grid(False, axis="x")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _write_numbers(axes: Axes, values: np.ndarray, highest: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        color = shade(float(value), highest)
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color)


def _add_scale(drawing: Figure, image: ScalarMappable, axes: Axes | Sequence[Axes], label: str) -> None:
    decimals = 0 if image.get_clim()[1] > 0.1 else 1
    percent = PercentFormatter(1.0, decimals)
    bar = drawing.colorbar(image, ax=axes, format=percent, label=label, shrink=0.8)
    bar.outline.set_visible(False)


def _draw_chance(axes: Axes, height: float, name: str, color: str = CHANCE["color"]) -> None:
    style: dict[str, Any] = {**CHANCE, "color": color}
    axes.axhline(height, label=f"{name}: {height:.1%}", **style)
