"""What came out, in plain sentences with their uncertainty.

Only what the figures can carry is said.
"""

from mixtral_jax.lab.ablation.results import ArmResult, Results
from mixtral_jax.lab.ablation.spread import Difference, Spread

# Stands where a figure is not there.
NOTHING = "-"
# By how much of a total collapse routing in training and on held-out text may differ without a
# word.
_MUCH = 0.1
# Fewer seeds than the one, and more comparisons than the other, deserve a warning.
_FEW_SEEDS, _MANY_COMPARISONS = 3, 2


def describe_findings(results: Results) -> list[str]:
    """The answer of an ablation: a sentence or two on loss, balance and what is not there."""
    if not any(result.done for result in results.arms):
        return ["No run is finished yet: there is nothing to compare."]
    parts = (describe_losses, describe_balance, describe_chance, describe_gaps)
    return [said for describe in parts if (said := describe(results))]


def describe_losses(results: Results) -> str:
    """Which arms learnt better or worse than the reference, and which cannot be told from it."""
    return _compare_all(results, "eval_loss", "held-out loss", digits=3) + _describe_dense_models(
        results
    )


def describe_balance(results: Results) -> str:
    """Whose routing was less even, at the end of training; and where held-out text is another
    matter.
    """
    said, called = "", "maximum violation"
    if results.unevenness == "collapse":
        most = ", ".join(
            f'{violation:.3g} for "{name}"'
            for name, violation in results.collapsed_violations.items()
        )
        said = f"Total collapse, all tokens to the same k of E experts, is a maximum violation of E/k - 1: {most}. "
        called = "share of total collapse"
    said += _compare_all(
        results, results.unevenness, f"{called} in training, over its last tenth,", digits=2
    )
    differing = [
        f'"{result.arm.name}" with {show_spread(result.spreads[f"eval_{results.unevenness}"], 2)} instead of '
        f"{show_spread(result.spreads[results.unevenness], 2)}"
        for result in results.arms
        if _differs_on_held_out_text(result)
    ]
    return (
        f"{said} On held-out text it differs much: {', '.join(differing)}." if differing else said
    )


def describe_chance(results: Results) -> str:
    """How far to trust the word clearly, where seeds are few or comparisons many."""
    pairs = [
        result.differences["eval_loss"].pairs
        for result in results.others
        if "eval_loss" in result.differences
    ]
    said = []
    if pairs and min(pairs) < _FEW_SEEDS:
        said.append(
            "With fewer than three seeds the spread itself is hardly known: more may undo what is "
            "clear here."
        )
    if len(pairs) > _MANY_COMPARISONS:
        said.append(
            f"Each figure is compared {len(pairs)} times: of 20 comparisons of arms that do not "
            "differ, one comes out "
            "clear by chance."
        )
    return " ".join(said)


def describe_flops(results: Results) -> str:
    """How much arithmetic the models of arms need, relative to the reference; and what no axis
    shows.
    """
    needed = {result.arm.name: result.fact("model_flops_per_step") for result in results.arms}
    reference = needed.pop(results.ablation.reference)
    if reference is None:
        return ""
    ratios = {name: flops / reference for name, flops in needed.items() if flops}
    differing = [
        f'"{name}" {ratio:.2f} times' for name, ratio in ratios.items() if abs(ratio - 1) > 0.005
    ]
    said = "The models of all arms need the same arithmetic, so tokens and FLOPs tell the same."
    if differing:
        said = (
            f'Of the FLOPs of "{results.ablation.reference}", a step needs: {", ".join(differing)}.'
        )
    configs = {f'"{result.arm.name}"': result.arm.config for result in results.arms}
    said += _describe_dense_models(results)
    batched = {
        name: config for name, config in configs.items() if config.train.gradient_accumulation > 1
    }
    if counting := [
        name for name, config in batched.items() if config.router.load_balance.scope == "global"
    ]:
        said += f" The forward pass in which {', '.join(counting)} counts routes before each step is not counted."
    return said


def describe_gaps(results: Results) -> str:
    """Which runs are missing or failed."""
    gaps = [
        f"{result.arm.name} ({'; '.join(result.reasons)})"
        for result in results.arms
        if result.reasons
    ]
    return f"Not finished: {', '.join(gaps)}." if gaps else ""


def show_spread(spread: Spread | None, digits: int) -> str:
    """As mean ± standard deviation."""
    if spread is None:
        return NOTHING
    return f"{spread.mean:.{digits}f}" + ("" if spread.sd is None else f" ± {spread.sd:.{digits}f}")


def show_difference(difference: Difference | None, digits: int) -> str:
    """With its sign, and the interval in brackets."""
    if difference is None:
        return NOTHING
    mean = f"{difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return mean
    return f"{mean} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def _describe_dense_models(results: Results) -> str:
    """What upcycled arms learnt before their first step, which no axis shows."""
    named = []
    for result in results.arms:
        if upcycle := result.arm.config.upcycle:
            base, length = upcycle.pretrain, result.arm.config.train.sequence_length
            size = (
                "trained elsewhere"
                if upcycle.base
                else f"{base.num_steps * base.batch_size * length:,} tokens"
            )
            named.append(f'"{result.arm.name}" ({size})')
    return (
        f" The training of the dense model that {', '.join(named)} began with is not counted."
        if named
        else ""
    )


def _compare_all(results: Results, name: str, called: str, digits: int) -> str:
    """One sentence for the reference, then one for each way the others differ from it."""
    reference = results.reference
    spread = reference.spreads.get(name)
    if spread is None:
        return f'Nothing to compare the {called} with: "{reference.arm.name}" has none yet.'
    seeds = f"{spread.count} seeds" if spread.count > 1 else "one seed, so without a spread"
    sentences = [
        f'The {called} of "{reference.arm.name}" is {show_spread(spread, digits)} ({_what(spread)} {seeds}).'
    ]
    groups: dict[str, list[str]] = {}
    for result in results.others:
        if difference := result.differences.get(name):
            groups.setdefault(_judge(difference), []).append(
                _describe(result, name, difference, digits)
            )
    sentences += [f"{verdict}: {', '.join(arms)}." for verdict, arms in sorted(groups.items())]
    return " ".join(sentences)


def _differs_on_held_out_text(result: ArmResult) -> bool:
    training, held_out = result.spreads.get("collapse"), result.spreads.get("eval_collapse")
    return (
        training is not None and held_out is not None and abs(held_out.mean - training.mean) > _MUCH
    )


def _what(spread: Spread) -> str:
    return "mean ± standard deviation over" if spread.count > 1 else "of"


def _judge(difference: Difference) -> str:
    if difference.low is None:
        return "With one seed, nobody can say whether this differs by more than chance"
    if not difference.is_clear:
        return "Not told apart from it"
    return "Clearly higher" if difference.mean > 0 else "Clearly lower"


def _describe(result: ArmResult, name: str, difference: Difference, digits: int) -> str:
    spread, apart = show_spread(result.spreads[name], digits), show_difference(difference, digits)
    return f'"{result.arm.name}" with {spread} ({apart})'
