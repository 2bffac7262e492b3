"""Pictures that compare arms: differences to the reference, and loss against balance."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mixtral_jax.lab.ablation.findings import describe_losses
from mixtral_jax.lab.ablation.records import RunRecord
from mixtral_jax.lab.ablation.results import MEASURES, ArmResult, Results
from mixtral_jax.lab.ablation.spread import show_difference
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
    """Draws held-out loss minus that of the reference with the same seed.

    One panel shows the difference over the run, the other its value at the end.
    """
    figure, (course, end) = make_figure(2, max(3.9, 0.55 * len(results.arms)), width_ratios=(3, 2))
    name = results.ablation.reference
    _draw_course(course, results, strokes)
    _draw_intervals(end, results, strokes)
    add_legend(figure, course)
    words = (
        f"Each run is compared with the run of {name} that has the same seed: both see the same "
        "rows in the same order, and start from the same parameters where shapes allow. Left: the "
        "mean over seeds, with a band from the lowest to the highest. Right: the end of the run. A "
        "dot is a seed, the wide bar the 95% confidence interval of the mean (Student's t). "
        f"{describe_losses(results)}"
    )
    return Picture("Difference in loss", words, figure)


@in_style
def draw_trade_off(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """Draws the final held-out loss of each run against its balance on held-out text."""
    figure, (panel,) = make_figure(1, 4.2)
    (unevenness,) = (
        measure for measure in MEASURES if measure.name == f"eval_{results.unevenness}"
    )
    for result in results.arms:
        stroke = strokes[result.arm.name]
        dots = [(unevenness.compute(record), record.last("eval/loss")) for record in result.done]
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
    meaning = "load of the busiest expert / even share - 1; 0 = even"
    if results.unevenness == "collapse":
        meaning = "as a share of total collapse, E/k - 1; 0 = even"
    panel.set_xlabel(f"maximum violation on held-out text ({meaning})")
    panel.set_ylabel("held-out loss (nats per token)")
    panel.set_xlim(left=0)
    add_legend(figure, panel)
    words = (
        "A dot is a run at its end. Routing is more even to the left, and the model is better "
        "further down, so a run that lies left of and below another is better in both. "
        f"{_describe_best(results)}"
    )
    return Picture("Balance against loss", words, figure)


def _tokens_scale(results: Results) -> tuple[float, str]:
    done = [record for result in results.arms for record in result.done]
    return scale_of(max(record.tokens()[-1] for record in done))


def _pair_seeds(result: ArmResult, reference: ArmResult) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns tokens and differences in loss at the evaluations, for each seed that both have."""
    by_seed = {record.run.seed: record for record in reference.done}
    return [
        _pair(record, by_seed[record.run.seed])
        for record in result.done
        if record.run.seed in by_seed
    ]


def _pair(record: RunRecord, other: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    here, there = record.series("eval/loss"), other.series("eval/loss")
    count = min(len(here.values), len(there.values))
    differences = here.values[:count] - there.values[:count]
    return record.tokens()[here.lines][:count], differences


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
    course.set_ylabel(f"held-out loss minus that of {name}\n(nats per token)")


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
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.set_xlabel("difference at the end (nats per token)")


def _describe_best(results: Results) -> str:
    losses = {
        result.arm.name: result.spreads["eval_loss"].mean for result in results.arms if result.done
    }
    measure = f"eval_{results.unevenness}"
    violations = {
        result.arm.name: result.spreads[measure].mean
        for result in results.arms
        if measure in result.spreads
    }
    text = f'"{min(losses, key=lambda name: losses[name])}" has the lowest mean loss'
    if not violations:
        return f"{text}."
    return f'{text}, "{min(violations, key=lambda name: violations[name])}" the most even routing.'
