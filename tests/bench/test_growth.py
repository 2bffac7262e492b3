"""How the cost of a step grows: what is measured, the fitted exponent, and what is warned of."""

import dataclasses

import pytest

from mixtral_jax.bench import growth
from mixtral_jax.bench.growth import (
    Case,
    Cost,
    describe_growth,
    fit_exponent,
    make_series,
    measure_cost,
    measure_growth,
)
from tests.cases import small_config

CONFIG = small_config()


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_is_found(exponent):
    assert fit_exponent({n: 3 * n**exponent for n in (1, 4, 16)}) == pytest.approx(exponent)


def test_one_size_has_no_exponent():
    assert fit_exponent({8: 1.0}) is None


def test_each_direction_grows_alone():
    series = make_series(CONFIG, num_devices=4)
    assert list(series["devices"]) == [1, 2, 4]
    grown = {
        "tokens": ("train", "batch_size", [8, 32, 128]),
        "sequence length": ("train", "sequence_length", [24, 96, 384]),
        "experts": ("model", "num_experts", [8, 16, 64]),
        "layers": ("model", "num_layers", [2, 4, 8]),
    }
    assert series.keys() == {*grown, "devices"}
    for direction, (section, key, sizes) in grown.items():
        for case, size in zip(series[direction].values(), sizes, strict=True):
            changed = dataclasses.replace(getattr(CONFIG, section), **{key: size})
            assert case == Case(dataclasses.replace(CONFIG, **{section: changed}))


def test_each_case_is_measured_once_and_growth_above_the_limit_is_warned_of(monkeypatch):
    measured = []

    def cost_of(case):
        """As the square of the sequence length, and on idle cores with many experts."""
        measured.append(case)
        length, experts = case.config.train.sequence_length, case.config.model.num_experts
        return Cost(length**2 / 1e4, 1.0 if experts == 64 else 1.9)

    monkeypatch.setattr(growth, "measure_cost", cost_of)
    monkeypatch.setattr(growth, "count_cores", lambda device: 2)
    figures = measure_growth(CONFIG)
    assert len(measured) == len(set(measured))
    assert figures["growth"]["sequence length"]["exponent"] == pytest.approx(2)
    assert figures["growth"]["tokens"]["exponent"] == pytest.approx(0)
    text = describe_growth(figures)
    warnings = [line for line in text.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "sequence length" in warnings[0] and "2.00" in warnings[0]
    assert "experts 64" in warnings[1] and "1.00 of 2 cores" in warnings[1]
    assert len(text.splitlines()) == 1 + 4 * 3 + 4 + 2


def test_where_no_cores_compute_none_can_be_idle(monkeypatch):
    monkeypatch.setattr(growth, "measure_cost", lambda case: Cost(1.0, 0.1))
    monkeypatch.setattr(growth, "count_cores", lambda device: None)
    assert "warning" not in describe_growth(measure_growth(CONFIG))


def test_the_step_of_a_case_runs_on_its_devices(monkeypatch):
    monkeypatch.setattr(growth, "NUM_MEASURED_STEPS", 1)
    cost = measure_cost(Case(CONFIG, num_devices=2))
    assert cost.seconds > 0 and cost.busy_cores > 0
