"""What an ablation file may contain: mistakes are refused before a step, by arm and key."""

from typing import Any

import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.lab.ablation.definition import plan_ablation, read_ablation
from tests.lab.ablations import MODEL, small_ablation

BASE = {"model": MODEL, "train": {"num_steps": 20, "batch_size": 8, "sequence_length": 32}}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"arms": {"some": {}, "bad": {"router.load_balance.wieght": 0}}},
            ["arm bad", "unknown", "did you mean"],
        ),
        (
            {"arms": {"some": {}, "bad": {"router.num_experts_per_token": 5}}},
            ["arm bad", "at most model.num_experts=4"],
        ),
        (
            {"arms": {"some": {}, "bad": {"router.load_balance": 1}}},
            ["arm bad", "router.load_balance is a section"],
        ),
        (
            {"arms": {"some": {}, "bad": {"data.path": "elsewhere"}}},
            ["arm bad", "data.path", "same in all arms"],
        ),
        (
            {"arms": {"some": {}, "bad": {"train.batch_size": 16}}},
            ["arm bad", "train.batch_size", "same in all arms"],
        ),
        (
            {"arms": {"some": {}, "bad": {"train.num_steps": 40}}},
            ["arm bad", "train.num_steps", "same in all arms"],
        ),
        (
            {"arms": {"some": {}, "bad": {"optimizer.learning_rate": 1}}},
            ["arm bad", "optimizer.learning_rate"],
        ),
        ({"arms": {"some": {}, "bad": {"model.vocab_size": 512}}}, ["arm bad", "model.vocab_size"]),
        (
            {"arms": {"some": {}, "twin": {"router.num_experts_per_token": 2}}},
            ["arm twin", "the same config as arm some"],
        ),
        (
            {"arms": {"some": {}, "2": {"router.num_experts_per_token": 1}}},
            ["arm '2'", "is not a number"],
        ),
        (
            {"arms": {"some": {}, "../up": {"router.num_experts_per_token": 1}}},
            ["arm '../up'", "names a folder"],
        ),
        ({"arms": {"some": 3}}, ["arm some", "dict from changed keys to values"]),
        (
            {"arms": {"some": {}, "bad": {"finetune": None}}},
            ["arm bad", "finetune", "same in all arms"],
        ),
        ({"base": {**BASE, "finetune": {}}}, ["section finetune"]),
        ({"reference": "other"}, ["reference='other'", "none, some"]),
        ({"seeds": (0, 0)}, ["seeds=(0, 0)", "different"]),
        ({"seeds": ()}, ["at least one"]),
        ({"question": " "}, ["question"]),
        ({"tokens": -1}, ["tokens=-1"]),
        ({"armes": {}}, ["unknown entry armes"]),
    ],
)
def test_a_mistake_is_refused_by_name(entries: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        small_ablation(**entries)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_an_entry_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="lacks arms, reference"):
        read_ablation({"question": "Why?", "base": BASE})


def test_tokens_give_the_number_of_steps_and_replace_that_of_the_parent() -> None:
    assert small_ablation(tokens=8 * 32 * 7 + 1).arms[0].config.train.num_steps == 8


def test_a_length_set_on_the_command_line_wins_over_the_tokens_of_the_file() -> None:
    file = read_ablation(
        {"question": "Why?", "base": BASE, "arms": {"a": {}}, "reference": "a", "tokens": 10**6}
    )
    file.base["train"]["num_steps"] = "3"
    assert plan_ablation(file).arms[0].config.train.num_steps == 3


def test_arms_differ_from_the_base_in_their_changes_alone_and_runs_in_their_seed() -> None:
    ablation = small_ablation()
    none, some = (arm.config for arm in ablation.arms)
    assert (none.router.load_balance.weight, some.router.load_balance.weight) == (0, 0.01)
    assert none.model == some.model
    assert [run.name for run in ablation.runs[:3]] == ["none/seed-0", "some/seed-0", "none/seed-1"]
    assert [run.config.train.seed for run in ablation.runs] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["none"], ["none/seed-0", "none/seed-1", "none/seed-2"]),
        (["some/seed-2"], ["some/seed-2"]),
        (["3"], ["some/seed-1"]),
        (["5", "0"], ["none/seed-0", "some/seed-2"]),
    ],
)
def test_runs_are_chosen_by_arm_by_name_and_by_number(names: list[str], chosen: list[str]) -> None:
    assert [run.name for run in small_ablation().select(names)] == chosen


def test_every_run_has_one_number_so_that_an_array_of_tasks_covers_all() -> None:
    ablation = small_ablation()
    tasks = [ablation.select([str(number)]) for number in range(len(ablation.runs))]
    assert [run.name for (run,) in tasks] == [run.name for run in ablation.runs]


@pytest.mark.parametrize("name", ["6", "nothing", "none/seed-3"])
def test_a_run_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--arm={name} is not the name of an arm"):
        small_ablation().select([name])
