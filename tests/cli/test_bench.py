"""The bench verb, on a model small enough to compile in seconds and with a clock of its own."""

import itertools
import json
import types

import pytest

from mixtral_jax.bench import step
from mixtral_jax.bench.parts import NOT_SEEN, PARTS
from mixtral_jax.bench.train import measure_train
from mixtral_jax.cli import bench
from mixtral_jax.config import ConfigError
from tests.cases import mesh_of, small_config

ROWS, LENGTH, D, F, V = 16, 32, 64, 256, 2048
NUM_LAYERS, NUM_EXPERTS, HEADS, KV_HEADS, HEAD_DIM = 1, 8, 4, 2, 32
FLAGS = [f"--config.model.num_layers={NUM_LAYERS}", f"--config.model.hidden_size={D}"]
FLAGS += [f"--config.train.sequence_length={LENGTH}", f"--config.train.batch_size={ROWS}"]


def clock_of(*seconds):
    """A stand-in for `time`: what is timed first takes the first of `seconds`, and so on."""
    ticks = itertools.accumulate(
        itertools.chain.from_iterable((1000.0, taken) for taken in seconds)
    )
    return types.SimpleNamespace(perf_counter=lambda: next(ticks))


@pytest.mark.runs
def test_bench_prints_one_json_line_whose_figures_are_those_of_the_clock(
    monkeypatch, capsys, tmp_path
):
    matmul, warmup, steps = 2.0, [50.0, 20.0], [0.5, 0.25, 0.5, 0.5, 9.0, 0.5, 0.5, 0.5]
    monkeypatch.setattr(step, "time", clock_of(matmul, *warmup, *steps))
    picture = tmp_path / "parts.png"
    assert bench.main([*FLAGS, "--json", f"--picture={picture}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["step_seconds_median"] == 0.5
    assert figures["tokens_per_second"] == ROWS * LENGTH / 0.5

    attention = 2 * D * HEADS * HEAD_DIM + 2 * D * KV_HEADS * HEAD_DIM
    outside = D * NUM_EXPERTS + attention + 2 * D  # The router, and a scale for each of two norms.
    layer, expert = NUM_LAYERS * outside, NUM_LAYERS * 3 * D * F
    active = layer + 2 * expert + D + V * D  # With the last norm and the unembedding.
    scores = NUM_LAYERS * HEADS * HEAD_DIM * LENGTH
    flops = 6 * (active + scores) * ROWS * LENGTH
    assert figures["model_flops_per_step"] == flops
    pair = 4 * 2048 * D * F  # Up and down again, for 2048 rows.
    ceiling = pair * int(2e10 / (pair / 2)) / matmul
    assert figures["ceiling_flops_per_second"] == pytest.approx(ceiling)
    assert figures["utilization"] == pytest.approx(flops / 0.5 / ceiling)

    profile = figures["profile"]
    assert profile["gap_seconds"] >= 0 and profile["step_seconds"] > 0
    seconds = profile["part_seconds"]
    assert sum(seconds.values()) == pytest.approx(profile["device_seconds"])
    assert all(seconds[part] > 0 for part in PARTS if part != NOT_SEEN)
    assert picture.read_bytes().startswith(b"\x89PNG")

    # A device holds an expert, and parameters with two moments and a gradient in float32; a whole
    # copy of the model on each would be more than all that a step needs.
    least = 3 * 4 * expert
    whole = 4 * 4 * (layer + NUM_EXPERTS * expert + 2 * V * D)
    logits = 4 * ROWS // 8 * LENGTH * V
    assert least < figures["peak_memory_bytes"] < whole + 4 * logits


def test_the_line_for_people_has_the_same_figures():
    figures = {
        "tokens_per_second": 12345.6,
        "step_seconds_median": 0.1234,
        "model_flops_per_step": 1e9,
        "ceiling_flops_per_second": 45.6e9,
        "utilization": 0.178,
        "peak_memory_bytes": 3 * 2**20,
    }
    expected = "12,346 tokens/s, 0.123 s a step, 18% of a dense matmul's 46 GFLOP/s, 3 MiB a device"
    assert step.describe_step(figures) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--picture=parts.pdf"], "must end in .png"),
        (["--picture=no/such/folder/parts.png"], "there is no folder no/such/folder"),
        *(
            (["--picture=parts.png", flag], "not allowed with argument")
            for flag in ("--train", "--layer", "--generate", "--growth")
        ),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(flags, message):
    with pytest.raises(ConfigError, match=message):
        bench.main(flags)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "muon"), ("name", "adafactor"), ("first_moment_dtype", "bfloat16")]
)
def test_the_train_step_is_compared_with_the_same_optimizer_only(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{key}={value}.*AdamW"):
        measure_train(small_config(**{f"optimizer__{key}": value}), mesh_of())
