"""The answer of an ablation in plain sentences, with its uncertainty.

A sentence calls a difference clear only if its 95% interval excludes 0.
"""

from mixtral_jax.lab.ablation.results import ArmResult, Results
from mixtral_jax.lab.ablation.spread import Difference, Spread, show_spread

# Routing that differs by more than this share of total collapse between training and held-out text
# is pointed out.
_MAX_COLLAPSE_DIFFERENCE = 0.1
# With fewer seeds than this, the report warns that the spread is hardly known.
_MIN_SEEDS = 3
# With more comparisons than this, the report warns of differences by chance.
_MAX_COMPARISONS = 2


def describe_findings(results: Results) -> list[str]:
    """Returns paragraphs on loss, balance, the role of chance, and runs that are not finished."""
    if not any(result.done for result in results.arms):
        return ["No run is finished yet, so there is nothing to compare."]
    parts = (describe_losses, describe_balance, describe_chance, describe_gaps)
    return [text for describe in parts if (text := describe(results))]


def describe_losses(results: Results) -> str:
    """Describes which arms have a clearly higher or lower held-out loss than the reference."""
    comparison = _compare_arms(results, "eval_loss", "held-out loss", digits=3)
    return comparison + _describe_dense_models(results)


def describe_balance(results: Results) -> str:
    """Describes whose routing was less even at the end of training, and on held-out text."""
    text, measure = "", "maximum violation"
    if results.unevenness == "collapse":
        collapsed = ", ".join(
            f'{violation:.3g} for "{name}"'
            for name, violation in results.collapsed_violations.items()
        )
        text = (
            "If all tokens chose the same k of E experts (total collapse), the maximum violation "
            f"would be E/k - 1: {collapsed}. "
        )
        measure = "maximum violation as a share of total collapse"
    measure = f"{measure}, averaged over the last tenth of training,"
    text += _compare_arms(results, results.unevenness, measure, digits=2)
    differing = [
        f'"{result.arm.name}" has {show_spread(result.spreads[f"eval_{results.unevenness}"], 2)} '
        f"instead of {show_spread(result.spreads[results.unevenness], 2)}"
        for result in results.arms
        if _differs_on_held_out_text(result)
    ]
    if differing:
        text += f" On held-out text it is very different: {', '.join(differing)}."
    return text


def describe_chance(results: Results) -> str:
    """Warns about what chance may do if there are few seeds or many comparisons."""
    pairs = [
        result.differences["eval_loss"].pairs
        for result in results.others
        if "eval_loss" in result.differences
    ]
    sentences = []
    if pairs and min(pairs) < _MIN_SEEDS:
        sentences.append(
            "With fewer than three seeds the spread between seeds is hardly known: more seeds may "
            "overturn what looks clear here."
        )
    if len(pairs) > _MAX_COMPARISONS:
        sentences.append(
            f"Each measure is compared {len(pairs)} times: if no arm really differed, about one "
            "comparison in 20 would still look clear."
        )
    return " ".join(sentences)


def describe_flops(results: Results) -> str:
    """Describes the FLOPs per step of each arm, and the work that they leave out."""
    flops = {result.arm.name: result.fact("model_flops_per_step") for result in results.arms}
    reference = flops.pop(results.ablation.reference)
    if reference is None:
        return ""
    ratios = {name: each / reference for name, each in flops.items() if each}
    differing = [
        f'"{name}" {ratio:.2f} times' for name, ratio in ratios.items() if abs(ratio - 1) > 0.005
    ]
    text = (
        "The models of all arms need the same FLOPs per step, so the loss looks the same against "
        "tokens and against FLOPs."
    )
    if differing:
        text = (
            f'FLOPs per step, relative to "{results.ablation.reference}": {", ".join(differing)}.'
        )
    return text + _describe_dense_models(results) + _describe_counting(results)


def describe_gaps(results: Results) -> str:
    """Lists the runs that are missing or failed."""
    gaps = [
        f"{result.arm.name} ({'; '.join(result.reasons)})"
        for result in results.arms
        if result.reasons
    ]
    return f"Not finished: {', '.join(gaps)}." if gaps else ""


def _describe_dense_models(results: Results) -> str:
    """Says that the pretraining of the dense models of upcycled arms is not counted."""
    models = []
    for result in results.arms:
        if upcycle := result.arm.config.upcycle:
            base, length = upcycle.pretrain, result.arm.config.train.sequence_length
            num_tokens = base.num_steps * base.batch_size * length
            size = "trained elsewhere" if upcycle.base else f"{num_tokens:,} tokens"
            models.append(f'"{result.arm.name}" ({size})')
    if not models:
        return ""
    return (
        " The training of the dense models that upcycled arms start from is not counted: "
        f"{', '.join(models)}."
    )


def _describe_counting(results: Results) -> str:
    """Says that FLOPs leave out the counting pass of balance losses over the global batch."""
    arms = [
        f'"{result.arm.name}"'
        for result in results.arms
        if result.arm.config.train.gradient_accumulation > 1
        and result.arm.config.router.load_balance.scope == "global"
    ]
    if not arms:
        return ""
    return (
        " The extra forward pass that counts routes before each step is not counted: "
        f"{', '.join(arms)}."
    )


def _compare_arms(results: Results, name: str, measure: str, digits: int) -> str:
    """Writes a sentence on the reference, then one for each verdict on the other arms."""
    reference = results.reference
    spread = reference.spreads.get(name)
    if spread is None:
        return f'The {measure} cannot be compared: "{reference.arm.name}" has no finished run.'
    sentences = [
        f'The {measure} is {show_spread(spread, digits)} for "{reference.arm.name}" '
        f"({_describe_seeds(spread)})."
    ]
    arms_by_verdict: dict[str, list[str]] = {}
    for result in results.others:
        if difference := result.differences.get(name):
            arm = (
                f'"{result.arm.name}" with {show_spread(result.spreads[name], digits)} '
                f"({_show_interval(difference, digits)})"
            )
            arms_by_verdict.setdefault(_judge(difference), []).append(arm)
    sentences += [
        f"{verdict}: {', '.join(arms)}." for verdict, arms in sorted(arms_by_verdict.items())
    ]
    return " ".join(sentences)


def _differs_on_held_out_text(result: ArmResult) -> bool:
    training, held_out = result.spreads.get("collapse"), result.spreads.get("eval_collapse")
    if training is None or held_out is None:
        return False
    return abs(held_out.mean - training.mean) > _MAX_COLLAPSE_DIFFERENCE


def _describe_seeds(spread: Spread) -> str:
    if spread.count == 1:
        return "one seed, so without a standard deviation"
    return f"mean ± standard deviation over {spread.count} seeds"


def _judge(difference: Difference) -> str:
    if difference.low is None:
        return "With one seed it is unknown whether this is more than chance"
    if not difference.is_clear:
        return "Not clearly different"
    return "Clearly higher" if difference.mean > 0 else "Clearly lower"


def _show_interval(difference: Difference, digits: int) -> str:
    mean = f"difference {difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return mean
    return f"{mean}, 95% interval {difference.low:+.{digits}f} to {difference.high:+.{digits}f}"
