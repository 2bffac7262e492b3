"""Pictures of a `RoutingAnalysis`, with a line of plain words each."""

import textwrap

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from mixtral_jax.lab.routing_analysis import RoutingAnalysis, pick_layers
from mixtral_jax.lab.routing_axes import (
    CHANCE,
    HEAT,
    add_scale,
    draw_chance,
    mark_layers,
    mark_shares,
    write_numbers,
)  # fmt: skip
from mixtral_jax.lab.specialization import LabelShares
from mixtral_jax.lab.style import COLOURS, Picture, add_legend, in_style, make_figure

# Of layers side by side; of experts with a bar for each name; of cells with a number in each; of lines in a plot.
_MOST_PANELS, _MOST_BARRED, _MOST_NUMBERED, _MOST_LINES = 3, 16, 16, 8


def draw_routing(analysis: RoutingAnalysis) -> list[Picture]:
    """All that there is something to draw for."""
    pictures = [draw_load(analysis), draw_coactivation(analysis), draw_repetition(analysis)]
    pictures += [draw_label(analysis, shares) for shares in analysis.by_label]
    if analysis.vocabulary.num_ids:
        pictures.append(draw_vocabulary(analysis))
    if analysis.saturation:
        pictures.append(draw_saturation(analysis))
    if analysis.flips:
        pictures.append(draw_flips(analysis))
    return pictures


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
        f"Which share of all routes each expert gets. Even loads are {1 / E:.1%} everywhere; a dark cell is an expert "
        "that does much of its layer's work, a pale one is hardly used."
    )
    return Picture("Load of experts", words, figure)


@in_style
def draw_coactivation(analysis: RoutingAnalysis) -> Picture:
    """A map of pairs for a few layers."""
    E, k = analysis.num_experts, analysis.num_experts_per_token
    layers = pick_layers(analysis.num_layers, _MOST_PANELS)
    chance = (k - 1) / max(E - 1, 1)
    highest = max(2 * chance, float(np.nanmax(analysis.coactivation_LEE[layers], initial=0)), 1e-9)
    figure, panels = make_figure(len(layers), 4.6)
    for panel, layer in zip(panels, layers, strict=True):
        colors = mpl.colormaps[HEAT].with_extremes(bad="#dddddd")
        pairs_EE = np.ma.masked_invalid(analysis.coactivation_LEE[layer])
        panel.imshow(pairs_EE, cmap=colors, vmin=0, vmax=highest)
        panel.grid(False)
        panel.set_title(f"layer {layer}", loc="left")
        panel.set_xlabel("also chosen: expert j")
        if E <= _MOST_NUMBERED:
            panel.set(xticks=range(E), yticks=range(E))
    panels[0].set_ylabel("chosen: expert i")
    add_scale(figure, panels[0].images[0], panels, f"P(j | i) (by chance {chance:.1%})")
    words = (
        "Of the tokens that choose expert i, the share that also choose expert j, over all pairs of a token's "
        f"{k} experts. By chance it is {chance:.1%}; dark pairs work together, pale ones hardly ever. "
        "Grey: itself, or never chosen."
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
        layers, repetition.chance_first_of_load_L, color=COLOURS[1], linestyle=":",
        label="first choice, if independent of the token before",
    )  # fmt: skip
    mark_layers(panel, analysis.num_layers)
    mark_shares(panel, "pairs of consecutive tokens", top=1.1 * top)
    add_legend(figure, panel)
    words = (
        "How often two consecutive tokens of a document have the same first choice, or share any expert "
        f"(as in Table 5 of the Mixtral paper), over {repetition.num_pairs:,} pairs. Dashed: experts drawn at random. "
        "Above the dotted line, routing follows the text and not just the experts' popularity."
    )
    return Picture("Repetition of consecutive choices", words, figure)


@in_style
def draw_label(analysis: RoutingAnalysis, shares: LabelShares) -> Picture:
    """Bars of each expert, for a few layers one below the other."""
    layers = pick_layers(analysis.num_layers, _MOST_PANELS)
    figure, panels = make_figure(1, 1.6 + 2.2 * len(layers), len(layers), sharey=True)
    for panel, layer in zip(panels, layers, strict=True):
        _draw_bars(panel, shares, layer)
        panel.set_title(f"layer {layer}", loc="left")
    panels[-1].set_xlabel("expert")
    mark_shares(panels[len(layers) // 2], "tokens of a kind that choose it")
    add_legend(figure, panels[0])
    shown = "" if analysis.num_experts <= _MOST_BARRED else f" Shown are the {_MOST_BARRED} experts that differ most."
    words = (
        f"Of the tokens of each {shares.title}, the share that choose an expert. Dashed: {shares.uniform:.1%}, if it "
        f"made no difference and loads were even. Bars of one expert that differ show what it is for.{shown}"
    )
    return Picture(f"Experts by {shares.title}", words, figure)


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
        "How far a token's id alone decides its first choice: of the tokens of one id, the share that go to that id's "
        f"most frequent expert, averaged over the {vocabulary.num_ids:,} ids with at least {vocabulary.fewest_tokens} "
        "tokens. 100%: the expert could be looked up in a table."
    )
    return Picture("Experts by token", words, figure)


@in_style
def draw_saturation(analysis: RoutingAnalysis) -> Picture:
    """A line for each of some layers, over steps."""
    saturation = analysis.saturation
    assert saturation is not None
    layers = pick_layers(analysis.num_layers, _MOST_LINES)
    figure, (panel,) = make_figure(1, 4.2)
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, color in zip(layers, colors, strict=True):
        panel.plot(saturation.steps, saturation.share_SL[:, layer], marker="o", color=color, label=f"layer {layer}")
    draw_chance(panel, saturation.chance, "by chance")
    panel.set_xlabel("step of the earlier checkpoint")
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_shares(panel, "experts that the last checkpoint chooses too", top=1.05)
    add_legend(figure, panel)
    words = (
        "How early routes settle: the share of a token's experts at an earlier step that the last checkpoint chooses "
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
    panel.plot(layers, flips.any_L, marker="o", color=COLOURS[0], label="any of its experts")
    panel.plot(layers, flips.first_L, marker="s", color=COLOURS[1], label="its first choice")
    mark_layers(panel, analysis.num_layers)
    mark_shares(panel, "tokens that change", top=max(0.01, 1.2 * float(flips.any_L.max())))
    add_legend(figure, panel)
    words = (
        f"The share of tokens whose experts change when the same weights compute in {flips.other_dtype} instead of "
        f"{flips.dtype}. Changes add up from layer to layer, since each layer sees what the ones before made of it."
    )
    return Picture("Routes that rounding flips", words, figure)


def _draw_bars(panel: Axes, shares: LabelShares, layer: int) -> None:
    share_XE = shares.share_LXE[layer]
    X, E = share_XE.shape
    experts = np.arange(E)
    if E > _MOST_BARRED:
        experts = np.sort(np.argsort(-np.ptp(share_XE, axis=0), kind="stable")[:_MOST_BARRED])
    width = 0.8 / X
    for number, name in enumerate(shares.names):
        places = np.arange(len(experts)) - 0.4 + (number + 0.5) * width
        label = f"{textwrap.shorten(name, 24, placeholder='...')} ({shares.tokens_X[number]:,} tokens)"
        panel.bar(places, share_XE[number, experts], width, color=COLOURS[number % len(COLOURS)], label=label)
    draw_chance(panel, shares.uniform, "uniform")
    panel.set_xticks(np.arange(len(experts)), labels=[str(expert) for expert in experts])
    panel.grid(False, axis="x")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
