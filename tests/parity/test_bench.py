"""What is timed beside transformers does the same work: the benchmarks themselves compare results.

Only `make test-parity` runs these tests: they need torch and transformers.
"""

import pytest

from mixtral_jax.bench import generate, layer, train
from mixtral_jax.bench.generate import describe_generate, measure_generate
from mixtral_jax.bench.layer import describe_layer, measure_layer
from mixtral_jax.bench.train import describe_train, measure_train
from tests.cases import mesh_of, small_config


def test_each_program_is_timed_on_the_same_weights_and_tokens(monkeypatch):
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(generate, "ROUNDS", 1)
    monkeypatch.setattr(layer, "ALTERNATIONS", 1)
    config, mesh = small_config(dispatch__grouped_matmul="blocks"), mesh_of()
    figures = measure_train(config, mesh)
    assert figures["times_as_fast"] == pytest.approx(
        figures["tokens_per_second"] / figures["transformers_tokens_per_second"]
    )
    assert "times as fast" in describe_train(figures)
    assert "transformers, 8 prompt(s) of 24 tokens" in describe_generate(
        measure_generate(config, mesh)
    )
    assert "zipf" in describe_layer(measure_layer(config, mesh))
