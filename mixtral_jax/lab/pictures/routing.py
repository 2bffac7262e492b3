"""All pictures of a routing analysis, each with a caption."""

import numpy as np

from mixtral_jax.lab.pictures.routing_axes import (
    CHANCE_STYLE,
    SHARES_COLOUR_MAP,
    add_scale,
    draw_chance,
    mark_layers,
    mark_shares,
    write_numbers,
)
from mixtral_jax.lab.pictures.routing_panels import (
    Analyses,
    draw_coactivation,
    draw_label,
    draw_saturation,
)
from mixtral_jax.lab.pictures.style import COLOURS, Picture, add_legend, in_style, make_figure
from mixtral_jax.lab.routing.analysis import RoutingAnalysis

# Maps of at most this many layers and experts have a number in each cell.
_MAX_NUMBERED = 16


def draw_routing(analysis: RoutingAnalysis) -> list[Picture]:
    """Draws every figure that the analysis has."""
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
    """Draws several analyses side by side: saturation, experts chosen together, specialization.

    Each picture shows the analyses that have its figure. `tokens_per_step` is that of training.
    """
    settled = {name: one for name, one in analyses.items() if one.saturation}
    paired = {name: one for name, one in analyses.items() if one.num_experts_per_token > 1}
    labelled = {name: one for name, one in analyses.items() if one.by_label}
    pictures = [draw_saturation(settled, tokens_per_step)] if settled else []
    pictures += [draw_coactivation(paired)] if paired else []
    return pictures + ([draw_label(labelled, 0)] if labelled else [])


@in_style
def draw_load(analysis: RoutingAnalysis) -> Picture:
    """Draws a map with a cell for each expert of each layer."""
    E, L, load_LE = analysis.num_experts, analysis.num_layers, analysis.balance.load_LE
    figure, (panel,) = make_figure(1, min(2.4 + 0.5 * L, 8.5))
    highest = max(2 / E, float(load_LE.max()))
    image = panel.imshow(load_LE, cmap=SHARES_COLOUR_MAP, vmin=0, vmax=highest, aspect="auto")
    panel.grid(False)
    mark_layers(panel, L, vertical=True)
    panel.set_xlabel("expert")
    if E <= _MAX_NUMBERED and L <= _MAX_NUMBERED:
        write_numbers(panel, load_LE, highest)
        panel.set_xticks(range(E))
    add_scale(figure, image, panel, f"share of routes (even: {1 / E:.1%})")
    words = (
        f"The share of all routes of a layer that each expert gets. An even load is {1 / E:.1%} "
        "everywhere. The darker a cell, the busier the expert; a pale expert is hardly used."
    )
    return Picture("Load of experts", words, figure)


@in_style
def draw_repetition(analysis: RoutingAnalysis) -> Picture:
    """Draws the repetition of choices by layer, with lines of chance."""
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
        label="first choice, if independent of the previous token",
    )
    mark_layers(panel, analysis.num_layers)
    mark_shares(panel, "pairs of consecutive tokens", top=1.1 * top)
    add_legend(figure, panel)
    words = (
        "How often two consecutive tokens of a document have the same first choice, or any expert "
        f"in common (as in Table 5 of the Mixtral paper), over {repetition.num_pairs:,} pairs. "
        "Dashed: experts drawn at random. Above the dotted line, routing follows the text and not "
        "just the popularity of the experts."
    )
    return Picture("Repetition of consecutive choices", words, figure)


@in_style
def draw_vocabulary(analysis: RoutingAnalysis) -> Picture:
    """Draws how far token ids decide routes, by layer, with a line of chance."""
    vocabulary = analysis.vocabulary
    figure, (panel,) = make_figure(1, 4.2)
    layers = range(analysis.num_layers)
    panel.plot(layers, vocabulary.share_L, marker="o", color=COLOURS[0], label="measured")
    panel.plot(layers, vocabulary.chance_L, label="if ids did not matter", **CHANCE_STYLE)
    mark_layers(panel, analysis.num_layers)
    mark_shares(panel, "tokens with the main expert of their id", top=1.05)
    add_legend(figure, panel)
    words = (
        "How far the id of a token alone decides its first choice: of the tokens of one id, the "
        f"share whose first choice is that id's most frequent expert, averaged over the "
        f"{vocabulary.num_ids:,} ids with at least {vocabulary.fewest_tokens} tokens. At 100% the "
        "expert could be looked up in a table of ids."
    )
    return Picture("Experts by token", words, figure)


@in_style
def draw_flips(analysis: RoutingAnalysis) -> Picture:
    """Draws the share of tokens whose routes change with the dtype, by layer."""
    flips = analysis.flips
    assert flips is not None
    figure, (panel,) = make_figure(1, 4.2)
    layers = range(analysis.num_layers)
    panel.plot(layers, flips.any_L, marker="o", color=COLOURS[0], label="set of experts")
    panel.plot(layers, flips.first_L, marker="s", color=COLOURS[1], label="first choice")
    mark_layers(panel, analysis.num_layers)
    mark_shares(
        panel,
        "tokens whose choice changes",
        top=max(0.01, 1.2 * float(max(flips.any_L.max(), flips.first_L.max()))),
    )
    add_legend(figure, panel)
    words = (
        "The share of tokens whose experts change if the same weights compute in "
        f"{flips.other_dtype} instead of {flips.dtype}. Changes add up from layer to layer, "
        "because each layer reads the output of the layers before it."
    )
    return Picture("Routes that rounding flips", words, figure)
