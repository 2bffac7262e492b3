"""Prints a routing analysis as tables for people; analysis.json has all figures."""

import math

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixtral_jax.lab.routing.analysis import RoutingAnalysis, Saturation
from mixtral_jax.lab.routing.figures import pick_layers
from mixtral_jax.lab.routing.specialization import LabelShares, VocabularyShares

MAX_SPECIALISTS = 5
MAX_SATURATION_LAYERS = 12
MAX_TOKEN_LAYERS = 3
MAX_TOKEN_EXPERTS = 16
MAX_TOKENS_PER_EXPERT = 6


def print_analysis(analysis: RoutingAnalysis, console: Console) -> None:
    """Prints the figures of every layer with their values by chance, then what experts are for."""
    console.print(
        f"{analysis.num_tokens:,} tokens through {analysis.num_layers} layers, each top-"
        f"{analysis.num_experts_per_token} of {analysis.num_experts} experts; "
        f"{analysis.repetition.num_pairs:,} pairs of consecutive tokens\n"
    )
    console.print(_tabulate_layers(analysis))
    if flips := analysis.flips:
        console.print(
            f"[dim]flips: tokens whose set of experts (or first choice) changes if the model "
            f"computes in {flips.other_dtype} instead of {flips.dtype}[/]"
        )
    console.print()
    if analysis.saturation:
        console.print(_tabulate_saturation(analysis.saturation))
    else:
        console.print(
            "no saturation: it needs checkpoints of earlier steps (set checkpoint.every and "
            "checkpoint.keep)"
        )
    for shares in analysis.by_label:
        console.print()
        console.print(_tabulate_specialists(shares))
    console.print()
    _print_tokens(analysis.vocabulary, console)


def _tabulate_layers(analysis: RoutingAnalysis) -> Table:
    balance, repetition, vocabulary = analysis.balance, analysis.repetition, analysis.vocabulary
    E, k = analysis.num_experts, analysis.num_experts_per_token
    columns = {
        "min load": (balance.load_LE.min(axis=-1), 1 / E),
        "max load": (balance.load_LE.max(axis=-1), 1 / E),
        "CV": (balance.coefficient_of_variation_L, 0.0),
        "entropy": (balance.load_entropy_L, 1.0),
        "max together": (_largest(analysis.coactivation_LEE), (k - 1) / max(E - 1, 1)),
        "repeats first": (repetition.first_L, repetition.chance_first),
        f"repeats any of {k}": (repetition.any_L, repetition.chance_any),
        "by token": (vocabulary.share_L, float(np.mean(vocabulary.chance_L))),
    }
    if analysis.flips:
        columns |= {
            "flips": (analysis.flips.any_L, math.nan),
            "flips first": (analysis.flips.first_L, math.nan),
        }
    table = _make_table("layer", *(f">{name}" for name in columns))
    for layer in range(analysis.num_layers):
        table.add_row(
            str(layer), *(_format(name, value_L[layer]) for name, (value_L, _) in columns.items())
        )
    table.add_row(
        "mean",
        *(_format(name, np.mean(value_L)) for name, (value_L, _) in columns.items()),
        style="bold",
    )
    table.add_row(
        "even, by chance",
        *(_format(name, chance) for name, (_, chance) in columns.items()),
        style="dim",
    )
    return table


def _largest(coactivation_LEE: np.ndarray) -> np.ndarray:
    """Returns the largest value of each layer; NaN if a token has a single expert."""
    largest_L = np.where(np.isnan(coactivation_LEE), -1, coactivation_LEE).max(axis=(1, 2))
    return np.where(largest_L < 0, np.nan, largest_L)


def _tabulate_saturation(saturation: Saturation) -> Table:
    layers = pick_layers(saturation.share_SL.shape[1], MAX_SATURATION_LAYERS)
    table = _make_table("saturation: step", *(f">layer {layer}" for layer in layers), ">mean")
    for step, share_L in zip(saturation.steps, saturation.share_SL, strict=True):
        table.add_row(
            f"{step:,}", *(_percent(share_L[layer]) for layer in layers), _percent(share_L.mean())
        )
    table.add_row("by chance", *[_percent(saturation.chance)] * (len(layers) + 1), style="dim")
    return table


def _tabulate_specialists(shares: LabelShares) -> Table:
    """The experts that tokens of one label choose most often relative to all tokens."""
    excess_LXE = shares.share_LXE - shares.of_all_LE[:, None]
    largest = np.argsort(-excess_LXE, axis=None, kind="stable")[:MAX_SPECIALISTS]
    table = _make_table(
        f"experts by {shares.title}", ">tokens", ">layer", ">expert", ">choose it", ">of all tokens"
    )
    for layer, number, expert in zip(*np.unravel_index(largest, excess_LXE.shape), strict=True):
        table.add_row(
            escape(shares.names[number]),
            f"{shares.tokens_X[number]:,}",
            str(layer),
            str(expert),
            _percent(float(shares.share_LXE[layer, number, expert])),
            _percent(float(shares.of_all_LE[layer, expert])),
        )
    return table


def _print_tokens(vocabulary: VocabularyShares, console: Console) -> None:
    if not vocabulary.num_ids:
        console.print(
            f"no table of tokens: no token id occurs at least {vocabulary.fewest_tokens} times"
        )
        return
    table = _make_table(
        "layer", ">expert", f"most often first choice for, of {vocabulary.num_ids:,} token ids"
    )
    for layer in pick_layers(len(vocabulary.top_tokens), MAX_TOKEN_LAYERS):
        for expert, tokens in enumerate(vocabulary.top_tokens[layer][:MAX_TOKEN_EXPERTS]):
            pieces = (
                f"{_show_piece(token.piece)} [dim]{token.share:.0%}[/]"
                for token in tokens[:MAX_TOKENS_PER_EXPERT]
            )
            table.add_row(str(layer), str(expert), "  ".join(pieces))
    console.print(table)


def _make_table(*headings: str) -> Table:
    """Makes a plain table; a heading that begins with > is of a column of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        justify = "right" if heading.startswith(">") else "left"
        table.add_column(heading.lstrip(">"), justify=justify, no_wrap=True)
    return table


def _show_piece(piece: str) -> str:
    """Escapes line ends and the like; leading spaces are shown as in the tokenizer."""
    return escape(repr(piece)[1:-1])


def _format(name: str, value: float) -> str:
    return (
        f"{value:.3f}" if name in ("CV", "entropy") and not math.isnan(value) else _percent(value)
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
