"""A routing analysis as tables for people; all of it is in its JSON."""

import math

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixtral_jax.cli.plan_tables import make_table
from mixtral_jax.lab.routing.analysis import RoutingAnalysis, Saturation, pick_layers
from mixtral_jax.lab.routing.specialization import LabelShares, VocabularyShares

_NUM_STRONGEST, _MOST_LAYERS, _MOST_EXPERTS, _MOST_TOKENS = 5, 3, 16, 6


def print_analysis(analysis: RoutingAnalysis, console: Console) -> None:
    """Every layer's figures with their means and what chance gives; then what experts are for."""
    console.print(
        f"{analysis.num_tokens:,} tokens through {analysis.num_layers} layers, each top-"
        f"{analysis.num_experts_per_token} of {analysis.num_experts} experts; "
        f"{analysis.repetition.num_pairs:,} pairs "
        "of consecutive tokens\n"
    )
    console.print(_tabulate_layers(analysis))
    if flips := analysis.flips:
        console.print(
            f"[dim]flips: tokens whose set of experts changes from {flips.dtype} to "
            f"{flips.other_dtype}[/]"
        )
    console.print()
    if analysis.saturation:
        console.print(_tabulate_saturation(analysis.saturation))
    else:
        console.print(
            "no saturation: it needs checkpoints of earlier steps (checkpoint.every, "
            "checkpoint.keep)"
        )
    for shares in analysis.by_label:
        console.print()
        console.print(_tabulate_strongest(shares))
    console.print()
    _print_tokens(analysis.vocabulary, console)


def _tabulate_layers(analysis: RoutingAnalysis) -> Table:
    balance, repetition, vocabulary = analysis.balance, analysis.repetition, analysis.vocabulary
    E, k = analysis.num_experts, analysis.num_experts_per_token
    columns = {
        "least load": (balance.load_LE.min(axis=-1), 1 / E),
        "most": (balance.load_LE.max(axis=-1), 1 / E),
        "CV": (balance.coefficient_of_variation_L, 0.0),
        "entropy": (balance.load_entropy_L, 1.0),
        "most together": (_largest(analysis.coactivation_LEE), (k - 1) / max(E - 1, 1)),
        "repeats first": (repetition.first_L, repetition.chance_first),
        f"repeats any of {k}": (repetition.any_L, repetition.chance_any),
        "by token": (vocabulary.share_L, float(np.mean(vocabulary.chance_L))),
    }
    if analysis.flips:
        columns |= {
            "flips": (analysis.flips.any_L, math.nan),
            "flips first": (analysis.flips.first_L, math.nan),
        }
    table = make_table("layer", *(f">{name}" for name in columns))
    for layer in range(analysis.num_layers):
        table.add_row(
            str(layer), *(_say(name, value_L[layer]) for name, (value_L, _) in columns.items())
        )
    table.add_row(
        "mean",
        *(_say(name, np.mean(value_L)) for name, (value_L, _) in columns.items()),
        style="bold",
    )
    table.add_row(
        "even, by chance",
        *(_say(name, chance) for name, (_, chance) in columns.items()),
        style="dim",
    )
    return table


def _largest(coactivation_LEE: np.ndarray) -> np.ndarray:
    """Of each layer; NaN where there is no pair."""
    largest_L = np.where(np.isnan(coactivation_LEE), -1, coactivation_LEE).max(axis=(1, 2))
    return np.where(largest_L < 0, np.nan, largest_L)


def _tabulate_saturation(saturation: Saturation) -> Table:
    """A row a step, a column for each of at most twelve layers."""
    L = saturation.share_SL.shape[1]
    layers = pick_layers(L, 12)
    table = make_table("saturation: step", *(f">layer {layer}" for layer in layers), ">mean")
    for step, share_L in zip(saturation.steps, saturation.share_SL, strict=True):
        table.add_row(
            f"{step:,}", *(_percent(share_L[layer]) for layer in layers), _percent(share_L.mean())
        )
    table.add_row("by chance", *[_percent(saturation.chance)] * (len(layers) + 1), style="dim")
    return table


def _tabulate_strongest(shares: LabelShares) -> Table:
    """The experts that a name's tokens choose most above what all tokens do."""
    above_LXE = shares.share_LXE - shares.of_all_LE[:, None]
    strongest = np.argsort(-above_LXE, axis=None, kind="stable")[:_NUM_STRONGEST]
    table = make_table(
        f"experts by {shares.title}", ">tokens", ">layer", ">expert", ">choose it", ">of all"
    )
    for layer, number, expert in zip(*np.unravel_index(strongest, above_LXE.shape), strict=True):
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
            f"no token is there {vocabulary.fewest_tokens} times: nothing to say of single tokens"
        )
        return
    L = len(vocabulary.top_tokens)
    table = make_table("layer", ">expert", f"first choice of (of {vocabulary.num_ids:,} ids)")
    for layer in pick_layers(L, _MOST_LAYERS):
        for expert, tokens in enumerate(vocabulary.top_tokens[layer][:_MOST_EXPERTS]):
            named = (
                f"{_show(token.piece)} [dim]{token.share:.0%}[/]" for token in tokens[:_MOST_TOKENS]
            )
            table.add_row(str(layer), str(expert), "  ".join(named))
    console.print(table)


def _show(piece: str) -> str:
    """A piece as one can read it: line ends as `\\n`, leading spaces as the model spells them."""
    return escape(repr(piece)[1:-1])


def _say(name: str, value: float) -> str:
    return (
        f"{value:.3f}" if name in ("CV", "entropy") and not math.isnan(value) else _percent(value)
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
