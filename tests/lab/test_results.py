"""The table and the findings of runs whose metrics are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.lab.ablation.definition import Ablation
from mixtral_jax.lab.ablation.findings import (
    describe_balance,
    describe_findings,
    describe_flops,
    describe_losses,
)
from mixtral_jax.lab.ablation.records import FAILURE
from mixtral_jax.lab.ablation.results import Results, read_results
from mixtral_jax.lab.ablation.spread import compare, measure_spread
from mixtral_jax.lab.pictures.comparisons import draw_trade_off
from mixtral_jax.lab.pictures.style import choose_strokes
from mixtral_jax.lab.report.table import make_columns
from tests.lab.ablations import small_ablation, write_run


def write_all(ablation: Ablation, workdir: Path, **settings: float) -> Results:
    """Writes every run. The seed changes both arms alike; `none` is worse and less even."""
    for run in ablation.runs:
        loss, violation = 4 + run.seed, 0.5
        if run.arm.name == "none":
            loss, violation = loss + 0.1 + 0.01 * run.seed, 2.0 + 0.1 * run.seed
        write_run(run, workdir, loss=loss, violation=violation, **settings)  # type: ignore[arg-type]
    return read_results(ablation, workdir)


def test_spread_and_interval_are_those_of_the_books() -> None:
    spread = measure_spread([1.0, 2.0, 4.0])
    assert spread is not None
    assert spread.mean == pytest.approx(7 / 3)
    assert spread.sd == pytest.approx(math.sqrt(7 / 3))
    difference = compare({0: 1.0, 1: 3.0, 2: 5.0, 7: 9.0}, {0: 0.0, 1: 1.0, 2: 2.0})
    assert difference is not None
    # Differences 1, 2, 3: mean 2, sd 1; the 97.5th percentile of Student's t with 2 degrees of
    # freedom is 4.302653.
    assert difference.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert difference.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert difference.pairs == 3
    assert not difference.is_clear


def test_one_seed_has_no_spread_and_nothing_is_clear() -> None:
    spread, difference = measure_spread([1.0]), compare({0: 5.0}, {0: 1.0})
    assert spread is not None and spread.sd is None
    assert difference is not None and difference.low is None and not difference.is_clear
    assert measure_spread([]) is None and compare({0: 1.0}, {1: 1.0}) is None


def test_what_a_seed_does_to_both_arms_does_not_widen_the_interval(tmp_path: Path) -> None:
    results = write_all(small_ablation(), tmp_path)
    none = results.others[0]
    assert none.spreads["eval_loss"].sd == pytest.approx(np.std([4.15, 5.16, 6.17], ddof=1))
    difference = none.differences["eval_loss"]
    assert difference.mean == pytest.approx(0.11)
    assert difference.is_clear and difference.low is not None and difference.low > 0.08


def test_figures_of_training_are_means_over_the_last_tenth(tmp_path: Path) -> None:
    results = write_all(small_ablation(seeds=(0,)), tmp_path)
    assert results.reference.spreads["loss"].mean == pytest.approx(4 + (1 / 19 + 1 / 20) / 2)
    assert results.reference.spreads["eval_loss"].mean == pytest.approx(4 + 1 / 20)


def test_words_say_which_arm_is_less_even_with_the_spread(tmp_path: Path) -> None:
    results = write_all(small_ablation(), tmp_path)
    expected = (
        'Clearly higher: "none" with 2.10 ± 0.10 (difference +1.60, 95% interval +1.35 to +1.85).'
    )
    assert expected in describe_balance(results)
    assert "over 3 seeds" in describe_losses(results)


def test_words_say_which_arms_are_even_in_training_alone(tmp_path: Path) -> None:
    ablation = small_ablation(seeds=(0,))
    for run in ablation.runs:
        write_run(
            run, tmp_path, loss=4, violation=0.1, held_out=0.9 if run.arm.name == "none" else 0.15
        )
    text = describe_balance(read_results(ablation, tmp_path))
    expected = ' On held-out text it is very different: "none" has 0.90 instead of 0.10.'
    assert text.endswith(expected)


def test_arms_that_can_be_uneven_by_different_amounts_are_compared_by_their_shares_of_that(
    tmp_path: Path,
) -> None:
    chosen = "router.num_experts_per_token"
    unasked = {
        "router.choice": "dense",
        "router.load_balance.weight": 0.0,
        "router.z_loss_weight": 0.0,
    }
    arms = {"one": {chosen: 1}, "two": {}, "all": {chosen: 4, **unasked}}
    ablation = small_ablation(arms=arms, reference="two")
    # With 4 experts, 1.5 is half of the total collapse of top-1, and 0.9 almost that of top-2.
    violations = {"one": 1.5, "two": 0.9, "all": 0.0}
    for run in ablation.runs:
        violation = violations[run.arm.name]
        if violation:
            violation += 0.01 * run.seed
        write_run(run, tmp_path, loss=4 + run.seed, violation=violation)
    results = read_results(ablation, tmp_path)
    text = describe_balance(results)
    assert 'the maximum violation would be E/k - 1: 3 for "one", 1 for "two".' in text
    assert (
        "as a share of total collapse, averaged over the last tenth of training, is 0.91 ±" in text
    )
    assert 'Clearly lower: "one" with 0.50 ± 0.00 (difference -0.41,' in text
    assert '"all" with 0.00' in text
    cells = {column.heading: column.cell(results.arms[0]) for column in make_columns(results)}
    assert cells["share of total collapse (E/k - 1)"] == "0.50 ± 0.00"
    picture = draw_trade_off(results, choose_strokes(list(arms), "two"))
    assert '"all" the most even routing.' in picture.words


def test_words_claim_nothing_from_one_seed(tmp_path: Path) -> None:
    text = describe_balance(write_all(small_ablation(seeds=(0,)), tmp_path))
    assert "one seed" in text
    assert "Clearly" not in text


def test_words_warn_of_few_seeds_and_of_many_comparisons(tmp_path: Path) -> None:
    for seeds, num_others in (((0, 1), 2), ((0, 1, 2), 2), ((0, 1, 2), 3)):
        others = {f"w={w}": {"router.load_balance.weight": float(w)} for w in range(num_others)}
        ablation = small_ablation(seeds=seeds, arms={"some": {}, **others})
        results = write_all(ablation, tmp_path / f"{len(seeds)}-{num_others}")
        text = " ".join(describe_findings(results))
        assert ("With fewer than three seeds" in text) == (len(seeds) < 3)
        assert ("compared 3 times" in text) == (num_others > 2)


def test_failed_and_missing_runs_are_listed_and_do_not_count(tmp_path: Path) -> None:
    ablation = small_ablation()
    first, second, third, *_ = ablation.runs
    write_run(first, tmp_path, loss=4, violation=2)
    (first.folder(tmp_path) / FAILURE).write_text(
        json.dumps({"reason": "FloatingPointError: loss is nan"})
    )
    write_run(second, tmp_path, loss=4, violation=1)
    write_run(third, tmp_path, loss=4, violation=2, last_step=10)
    none, some = read_results(ablation, tmp_path).to_json()["arms"]
    assert (none["status"], some["status"]) == ("failed", "missing")
    assert none["reasons"] == [
        "seed 0: FloatingPointError: loss is nan",
        "seed 1: running or stopped, at step 10 of 20",
        "seed 2: not started",
    ]
    assert none["eval_loss_mean"] is None
    assert some["eval_loss_mean"] == pytest.approx(4.05)
    assert none["eval_loss_difference"] is None


def test_a_run_that_saw_other_rows_has_failed(tmp_path: Path) -> None:
    ablation = small_ablation(seeds=(0,))
    none, some = ablation.runs
    write_run(none, tmp_path, loss=4, violation=2)
    write_run(some, tmp_path, loss=4, violation=1, rows="others")
    results = read_results(ablation, tmp_path)
    assert results.failed == ["some/seed-0"]
    assert "saw other rows than none/seed-0 at step 1" in results.reference.reasons[0]


def test_what_the_clock_says_is_apart_from_the_rest(tmp_path: Path) -> None:
    ablation = small_ablation()
    slow = write_all(ablation, tmp_path / "slow", speed=10).to_json()
    fast = write_all(ablation, tmp_path / "fast", speed=1000).to_json()
    for table in (slow, fast):
        clocks = [arm.pop("clock") for arm in table["arms"]]
        assert all(clock["tokens_per_second_mean"] in (10, 1000) for clock in clocks)
    assert slow == fast


def test_words_say_what_an_upcycled_arm_does_not_count(tmp_path: Path) -> None:
    arms = {"up": {"upcycle.method": "copy"}, "other": {"upcycle.base": "DIR"}, "some": {}}
    results = write_all(small_ablation(arms=arms, seeds=(0,)), tmp_path)
    text = describe_flops(results)
    # The dense model of "up" trains for 400 steps of 16 rows of 32 tokens.
    expected = 'is not counted: "up" (204,800 tokens), "other" (trained elsewhere).'
    assert expected in text and expected in describe_losses(results)
    assert "The models of all arms need the same FLOPs" in text


def test_words_say_that_a_loss_over_the_whole_batch_counts_routes_first(tmp_path: Path) -> None:
    arms = {"global": {"router.load_balance.scope": "global"}, "micro": {}}
    for parts in (1, 2):
        changed = {
            name: {**changes, "train.gradient_accumulation": parts}
            for name, changes in arms.items()
        }
        ablation = small_ablation(arms=changed, reference="micro")
        text = describe_flops(write_all(ablation, tmp_path / f"{parts}"))
        assert ('counts routes before each step is not counted: "global".' in text) == (parts == 2)
