"""Pictures of arms against the reference: the difference of each pair of seeds, and what evenness
cost.
"""

import numpy as np
from matplotlib.axes import Axes

from mixtral_jax.lab.ablation.findings import describe_losses, show_difference
from mixtral_jax.lab.ablation.records import RunRecord
from mixtral_jax.lab.ablation.results import MEASURES, ArmResult, Results
from mixtral_jax.lab.pictures.style import (
    Picture,
    Stroke,
    add_legend,
    in_style,
    make_figure,
    scale_of,
)


@in_style
def draw_differences(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """Held-out loss less that of the reference with the same seed: over the run, and at its end."""
    figure, (course, end) = make_figure(2, max(3.9, 0.55 * len(results.arms)), width_ratios=(3, 2))
    name = results.ablation.reference
    _draw_course(course, results, strokes)
    _draw_intervals(end, results, strokes)
    add_legend(figure, course)
    words = (
        f"Each run is compared with the run of {name} that has the same seed: the same rows in the "
        "same order, and the "
        "same parameters at the start where shapes allow. Left: the mean over seeds, the band from "
        "the lowest to the "
        "highest. Right: the end of the run; a dot is a seed, a bar the interval that holds the "
        "true mean with 95% "
        f"confidence (Student's t). {describe_losses(results)}"
    )
    return Picture("Difference of loss", words, figure)


@in_style
def draw_trade_off(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """What an arm's evenness is worth in loss: a dot for each run."""
    figure, (panel,) = make_figure(1, 4.2)
    (unevenness,) = (
        measure for measure in MEASURES if measure.name == f"eval_{results.unevenness}"
    )
    for result in results.arms:
        stroke = strokes[result.arm.name]
        dots = [(unevenness.of(record), record.last("eval/loss")) for record in result.done]
        dots = [(x, y) for x, y in dots if x is not None and y is not None]
        if dots:
            x_S, y_S = np.array(dots).T
            panel.scatter(
                x_S,
                y_S,
                color=stroke.colour,
                marker=stroke.marker,
                s=42,
                label=result.arm.name,
                alpha=0.9,
            )
    said = "busiest expert / even share - 1; 0 = even"
    said += ", 1 = total collapse: divided by E/k - 1" if results.unevenness == "collapse" else ""
    panel.set_xlabel(f"maximum violation on held-out text ({said})")
    panel.set_ylabel("held-out loss (nats a token)")
    panel.set_xlim(left=0)
    add_legend(figure, panel)
    words = (
        "A dot is a run at its end. Left is even routing, down is a better model: what lies left "
        "of and below another "
        f"beats it in both. {_describe_best(results)}"
    )
    return Picture("Evenness against loss", words, figure)


def _tokens_scale(results: Results) -> tuple[float, str]:
    done = [record for result in results.arms for record in result.done]
    return scale_of(max(record.tokens()[-1] for record in done))


def _pair_seeds(result: ArmResult, reference: ArmResult) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each seed that both have: tokens at the evaluations, and the difference of their losses."""
    by_seed = {record.run.seed: record for record in reference.done}
    return [
        _pair(record, by_seed[record.run.seed])
        for record in result.done
        if record.run.seed in by_seed
    ]


def _pair(record: RunRecord, other: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    numbers, losses = record.series("eval/loss")
    losses_there = other.series("eval/loss")[1]
    count = min(len(losses), len(losses_there))
    return record.tokens()[numbers][:count], losses[:count] - losses_there[:count]


def _draw_course(course: Axes, results: Results, strokes: dict[str, Stroke]) -> None:
    name = results.ablation.reference
    size, unit = _tokens_scale(results)
    for result in results.others:
        stroke = strokes[result.arm.name]
        pairs = _pair_seeds(result, results.reference)
        if not pairs:
            continue
        count = min(len(tokens) for tokens, _ in pairs)
        x_N = np.mean([tokens[:count] for tokens, _ in pairs], axis=0) / size
        y_SN = np.stack([difference[:count] for _, difference in pairs])
        course.plot(
            x_N, y_SN.mean(0), color=stroke.colour, marker=stroke.marker, label=result.arm.name
        )
        course.fill_between(
            x_N, y_SN.min(0), y_SN.max(0), color=stroke.colour, alpha=0.15, linewidth=0
        )
    course.axhline(0, color=strokes[name].colour, linewidth=1.2, label=f"{name} (reference)")
    course.set_xlabel(f"tokens seen{unit}")
    course.set_ylabel(f"held-out loss less that of {name}\n(nats a token)")


def _draw_intervals(panel: Axes, results: Results, strokes: dict[str, Stroke]) -> None:
    shown = [result for result in results.others if "eval_loss" in result.differences]
    reference = {record.run.seed: record.last("eval/loss") for record in results.reference.done}
    for row, result in enumerate(shown):
        stroke, difference = strokes[result.arm.name], result.differences["eval_loss"]
        if difference.low is not None and difference.high is not None:
            panel.plot(
                [difference.low, difference.high],
                [row, row],
                color=stroke.colour,
                linewidth=2.2,
                alpha=0.55,
            )
        dots = [
            (record.last("eval/loss") or 0) - (reference[record.run.seed] or 0)
            for record in result.done
            if record.run.seed in reference
        ]
        panel.plot(dots, [row] * len(dots), "o", color=stroke.colour, markersize=4, alpha=0.6)
        panel.plot(
            difference.mean, row, "|", color=stroke.colour, markersize=16, markeredgewidth=2.2
        )
        panel.annotate(
            show_difference(difference, 3),
            (difference.mean, row),
            xytext=(0, 13),
            textcoords="offset points",
            ha="center",
            color=stroke.colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    panel.axvline(0, color=strokes[results.ablation.reference].colour, linewidth=1.2)
    panel.set_yticks(range(len(shown)), [result.arm.name for result in shown])
    panel.set_ylim(len(shown) - 0.4, -0.7)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("difference at the end (nats a token)")


def _describe_best(results: Results) -> str:
    named = [
        (result.spreads["eval_loss"].mean, result.arm.name)
        for result in results.arms
        if result.done
    ]
    name = f"eval_{results.unevenness}"
    even = [
        (result.spreads[name].mean, result.arm.name)
        for result in results.arms
        if name in result.spreads
    ]
    said = f'The lowest mean loss is that of "{min(named)[1]}"'
    return f'{said}, the most even routing that of "{min(even)[1]}".' if even else f"{said}."
