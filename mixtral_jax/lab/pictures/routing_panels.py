"""Pictures of routing that show several analyses side by side, or several layers of one."""

import textwrap
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from mixtral_jax.lab.pictures.routing_axes import (
    add_ratio_scale,
    draw_chance,
    draw_ratios,
    mark_shares,
)
from mixtral_jax.lab.pictures.style import (
    COLOURS,
    Picture,
    add_legend,
    in_style,
    make_grid,
    scale_of,
    set_panel_title,
)
from mixtral_jax.lab.routing.analysis import RoutingAnalysis
from mixtral_jax.lab.routing.figures import MIN_TOKENS_PER_PAIR, pick_layers
from mixtral_jax.lab.routing.specialization import LabelShares

# Title of the panels -> analysis. A single analysis has an empty title.
Analyses = Mapping[str, RoutingAnalysis]

_MAX_LAYER_PANELS_ALONE = 3
_MAX_LAYER_PANELS_SIDE_BY_SIDE = 2
_MAX_COLUMNS = 4
_MAX_NUMBERED_EXPERTS = 16
_MAX_BARS_PER_LABEL = 16
_MAX_LINES = 8
_MAX_NAME_LETTERS = 24


@in_style
def draw_coactivation(analyses: Analyses) -> Picture:
    """Draws a map of pairs of experts, for a few layers of each analysis."""
    shown = _list_panels(analyses)
    columns = min(len(shown), _MAX_COLUMNS)
    figure, panels = make_grid(len(shown), columns, min(4.6, 11.5 / columns))
    for panel, (title, analysis, layer) in zip(panels, shown, strict=True):
        draw_ratios(panel, analysis.lift()[layer])
        set_panel_title(panel, title)
        if analysis.num_experts <= _MAX_NUMBERED_EXPERTS:
            panel.set(xticks=range(analysis.num_experts), yticks=range(analysis.num_experts))
        panel.set_xlabel("chosen with expert")
    for panel in panels[::columns]:
        panel.set_ylabel("expert")
    add_ratio_scale(figure, panels, "how often both are chosen, relative to chance")
    words = (
        "How often two experts are chosen for the same token, relative to chance: what their "
        "popularity alone predicts. All pairs of a token's experts count. White (1) is as often as "
        "if every choice ignored the others, 2 is twice as often. Grey: an expert with itself, and "
        f"pairs of fewer than {MIN_TOKENS_PER_PAIR} tokens, both as measured and as predicted."
    )
    return Picture("Experts chosen together", words, figure)


@in_style
def draw_label(analyses: Analyses, number: int) -> Picture:
    """Draws bars for each expert and label of one labelling, for a few layers of each analysis.

    `number` is the index of the labelling in `RoutingAnalysis.by_label`.
    """
    shown = _list_panels(analyses)
    columns, height = (1, 3.0) if len(analyses) == 1 else (2, 2.4)
    figure, panels = make_grid(len(shown), columns, height, sharey=True)
    for panel, (title, analysis, layer) in zip(panels, shown, strict=True):
        _draw_bars(panel, analysis.by_label[number], layer)
        set_panel_title(panel, title)
        panel.set_xlabel("expert")
    mark_shares(panels[0], "tokens that\nchoose the expert")
    add_legend(figure, *panels)
    shares = [analysis.by_label[number] for analysis in analyses.values()]
    is_cut = any(each.share_LXE.shape[-1] > _MAX_BARS_PER_LABEL for each in shares)
    words = (
        f"The share of tokens of each {shares[0].title} that choose an expert. The dashed line "
        "is the share if the experts were chosen evenly. Where the bars of an expert differ, it "
        "specializes."
    )
    if is_cut:
        words += f" Shown are the {_MAX_BARS_PER_LABEL} experts whose bars differ most."
    return Picture(f"Experts by {shares[0].title}", words, figure)


@in_style
def draw_saturation(analyses: Analyses, tokens_per_step: int | None = None) -> Picture:
    """Draws a line for some layers of each analysis.

    The horizontal axis shows steps, or tokens if `tokens_per_step` is given.
    """
    figure, panels = make_grid(
        len(analyses), _MAX_COLUMNS, 4.2 if len(analyses) == 1 else 3.0, sharey=True
    )
    for panel, (name, analysis) in zip(panels, analyses.items(), strict=True):
        _draw_saturation(panel, analysis, tokens_per_step)
        set_panel_title(panel, name)
    mark_shares(panels[0], "experts that the last\ncheckpoint chooses too", top=1.05)
    add_legend(figure, *panels)
    words = (
        "How early routes settle: the share of a token's experts at an earlier step that the last "
        "checkpoint chooses too (router saturation, OLMoE). The routes of a layer near 100% hardly "
        "change any more."
    )
    return Picture("Saturation of routes", words, figure)


def _list_panels(analyses: Analyses) -> list[tuple[str, RoutingAnalysis, int]]:
    """Returns the title, the analysis and the layer of each panel."""
    max_layers = _MAX_LAYER_PANELS_ALONE if len(analyses) == 1 else _MAX_LAYER_PANELS_SIDE_BY_SIDE
    return [
        (f"{name}, layer {layer}" if name else f"layer {layer}", analysis, layer)
        for name, analysis in analyses.items()
        for layer in pick_layers(analysis.num_layers, max_layers)
    ]


def _draw_saturation(panel: Axes, analysis: RoutingAnalysis, tokens_per_step: int | None) -> None:
    saturation = analysis.saturation
    assert saturation is not None
    place_S = np.array(saturation.steps) * (tokens_per_step or 1)
    size, unit = scale_of(place_S.max()) if tokens_per_step else (1, "")
    layers = pick_layers(analysis.num_layers, _MAX_LINES)
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
    if E > _MAX_BARS_PER_LABEL:
        by_range = np.argsort(-np.ptp(share_XE, axis=0), kind="stable")
        experts = np.sort(by_range[:_MAX_BARS_PER_LABEL])
    width = 0.8 / X
    for number, name in enumerate(shares.names):
        places = np.arange(len(experts)) - 0.4 + (number + 0.5) * width
        short = textwrap.shorten(name, _MAX_NAME_LETTERS, placeholder="...")
        panel.bar(
            places,
            share_XE[number, experts],
            width,
            color=COLOURS[number % len(COLOURS)],
            label=f"{short} ({shares.tokens_X[number]:,} tokens)",
        )
    draw_chance(panel, shares.uniform, "even")
    panel.set_xticks(np.arange(len(experts)), labels=[str(expert) for expert in experts])
    panel.grid(False, axis="x")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
