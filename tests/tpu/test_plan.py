"""Plans compiled with libtpu for TPU slices that are not here: `make test-tpu`. Needs no TPU."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.cli.flags import load_config_file
from mixtral_jax.config import Config, MeshConfig, RematName, build
from mixtral_jax.kernels.remat import kept_bytes
from mixtral_jax.parallel.mesh import make_mesh
from mixtral_jax.plan.chips import SLICES
from mixtral_jax.plan.estimate import Plan, make_plan
from mixtral_jax.plan.topology import open_target, parse_topology

pytest.importorskip("libtpu")
ROOT = Path(__file__).parents[2]


@functools.cache
def plan_of(topology: str, **overrides: int | str | float | None) -> Plan:
    """The plan of the default run with some keys changed; layers keep nothing by default."""
    mapping = load_config_file(ROOT / "configs/pretrain/tiny.py")
    for name, value in {"model__remat": "full", **overrides}.items():
        *sections, key = name.split("__")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, mapping)[
            key
        ] = value
    return make_plan(
        build(Config, mapping), open_target(parse_topology(topology), cpu_fallback=False)
    )


def test_the_default_run_but_wider_fits_four_chips() -> None:
    plan = plan_of("v5p:2x2x1", model__hidden_size=256)
    assert plan.fits
    assert not plan.target.is_estimate
    memory = plan.step.memory
    assert memory.parameters + memory.optimizer < memory.peak < 2**30


def test_rows_travel_once_there_and_once_home_and_once_more_where_recomputed() -> None:
    plan = plan_of("v5p:2x2x1", model__hidden_size=256)
    # The weights of the routes are sent too: one number per row, which XLA pads to 128.
    rows = [
        c
        for c in plan.collectives
        if c.op == "ragged-all-to-all" and not c.operand.endswith(",1,128]")
    ]
    # 4 layers, 4 sequences of 128 tokens per chip, 2 routes per token, 256 float32 numbers per row.
    # Three quarters of the rows leave the chip.
    once = 4 * (4 * 128) * 2 * 256 * 4 * 3 // 4
    sent = {
        name: sum(c.bytes_per_device for c in rows if c.pass_ == name)
        for name in ("forward", "backward")
    }
    assert sent == {"forward": 2 * once, "backward": 2 * once}
    assert sum(c.bytes_per_device for c in rows if c.pass_ == "rematerialized") == once
    assert {c.axis for c in rows} == {"expert"}


def test_plans_leave_the_compilation_cache_alone() -> None:
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    before = set(cache.iterdir())
    plan_of("v5p:2x2x1", model__hidden_size=256)
    # A step that equals an earlier one would be read from the cache, with a warning.
    plan_of.__wrapped__("v5p:2x2x1", model__hidden_size=256)
    assert set(cache.iterdir()) == before
    assert jax.config.jax_enable_compilation_cache


def test_every_collective_has_an_axis_and_the_loop_over_layers_is_counted() -> None:
    plan = plan_of("v5p:2x2x1", model__hidden_size=256)
    assert all(c.axis == "expert" for c in plan.collectives)
    assert {c.count for c in plan.collectives if c.op == "ragged-all-to-all"} == {4}


def test_gradients_of_expert_weights_are_scattered_and_never_summed_whole() -> None:
    plan = plan_of("v5p:2x2x1", model__hidden_size=256, model__dtype="bfloat16", mesh__fsdp=2)
    # 4 layers, 4 experts per chip, 256 x 256 numbers of two bytes, 3 matrices. Half of each leaves.
    expert_bytes = 4 * (4 * 256 * 256 * 2) * 3 // 2
    sent = {
        op: sum(
            c.bytes_per_device
            for c in plan.collectives
            if (c.op, c.axis, c.pass_) == (op, "fsdp", "backward")
        )
        for op in ("reduce-scatter", "all-reduce")
    }
    # Dense weights and the padding of shards add a little. XLA all-reduces the smallest dense ones.
    assert expert_bytes <= sent["reduce-scatter"] < 1.4 * expert_bytes
    assert sent["all-reduce"] < expert_bytes / 3


@pytest.mark.parametrize("topology", ["v5p:2x2x2", "v6e:2x4"])
def test_matmuls_of_the_program_are_those_of_a_count_by_hand(topology: str) -> None:
    # A buffer for balanced routing, and one for the worst case, four times as large and not used.
    for buffer_factor in (1.0, None):
        plan = plan_of(topology, dispatch__buffer_factor=buffer_factor)
        assert plan.hardware_flops == flops_by_hand()


@pytest.mark.parametrize("num_places", [2, 4])
def test_several_experts_per_chip_cost_no_more_flops_than_one(num_places: int) -> None:
    plan = plan_of("v5p:2x2x2", mesh__expert=num_places, mesh__fsdp=8 // num_places)
    assert plan.hardware_flops == pytest.approx(flops_by_hand(), rel=0.05)


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_layers_keep_no_more_than_what_remat_is_chosen_by(remat: RematName) -> None:
    full, kept = (
        plan_of("v5p:2x2x1", model__hidden_size=256, model__remat=name) for name in ("full", remat)
    )
    config = kept.step.config
    more = kept_bytes(config, remat) - kept_bytes(config, "full")
    assert 0 < kept.step.memory.peak - full.step.memory.peak <= more


def test_tokamax_is_planned_as_if_on_the_target_and_multiplies_no_empty_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tokamax")
    # A command line with flags that tokamax does not know must not disturb it.
    monkeypatch.setattr("sys.argv", ["train.py", "--config=configs/pretrain/tiny.py"])
    plan = plan_of("v5p:2x2x2", dispatch__grouped_matmul="tokamax", model__dtype="bfloat16")
    # The down projection counts once too often: jax keeps the unused result of a custom gradient,
    # which XLA removes.
    down_flops = 16 * 128 * 4 * 2 * 256 * 128 * 2
    assert plan.hardware_flops == flops_by_hand() + down_flops


def test_tokamax_fills_no_standard_error() -> None:
    """By default it would warn about every matrix that its shape was not autotuned."""
    pytest.importorskip("tokamax")
    flags = (
        "--topology=v5p:2x2x1",
        "--config.dispatch.grouped_matmul=tokamax",
        "--config.model.dtype=bfloat16",
    )
    command = (
        sys.executable,
        "-m",
        "mixtral_jax",
        "plan",
        f"--config={ROOT / 'configs/pretrain/tiny.py'}",
        *flags,
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Autotuning" not in done.stderr


def flops_by_hand(rank: int = 0) -> int:
    """FLOPs of a step of the default run.

    Layers run forward, once more for rematerialisation, and twice for the gradients. The output of
    the experts and the logits are not recomputed. With adapters of `rank` on attention and experts,
    frozen weights only have gradients of their inputs.
    """
    D, F, N, K, H, E, A, T, V = 128, 256, 4, 2, 32, 8, 2, 128, 2048
    weights, attention = 2 * D * (2 * N * H + 2 * K * H) + 2 * D * E + 6 * D * F * A, 4 * N * H * T
    adapters = 2 * rank * (2 * (D + N * H) + 2 * (D + K * H) + 3 * (D + F) * A)
    not_again = (2 * D * F + 2 * rank * D) * A
    times = 3 if rank else 4
    return (
        16
        * T
        * (
            4 * (times * weights + 4 * attention + 4 * adapters - not_again)
            + (times - 1) * 2 * D * V
        )
    )


def test_tuning_adapters_takes_no_gradient_and_no_moments_of_frozen_weights() -> None:
    adapters = {"finetune__lora__rank": 8, "finetune__frozen_dtype": "bfloat16"}
    plan, full = plan_of("v5p:2x2x2", **adapters), plan_of("v5p:2x2x2")
    assert plan.hardware_flops == flops_by_hand(rank=8)
    assert plan.step.memory.parameters < 0.6 * full.step.memory.parameters
    assert plan.step.memory.optimizer < 0.2 * full.step.memory.optimizer
    assert plan.step.memory.peak < full.step.memory.peak
    assert plan.step.trained.total < 0.15 * plan.step.parameters.total


def test_what_does_not_fit_is_still_planned_and_says_what_to_change() -> None:
    plan = plan_of(
        "v6e:2x2", model__vocab_size=1_048_576, model__hidden_size=2048, train__batch_size=64
    )
    assert not plan.fits
    assert plan.step.memory.peak > plan.hbm_bytes
    assert plan.to_json()["advice"]
    assert plan.collectives


def test_mesh_axes_may_take_a_part_of_an_axis_of_the_torus() -> None:
    target = open_target(parse_topology("v5p:4x4x4"), cpu_fallback=False)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, expert=8), target.devices)
    assert mesh.devices.shape == (1, 8, 8, 1, 1)
    experts = np.array([device.coords for device in mesh.devices[0, 0, :, 0, 0]])
    assert sorted(np.ptp(experts, axis=0) + 1) == [
        1,
        2,
        4,
    ]  # Neighbours in two dimensions of the torus.


@pytest.mark.parametrize("chip", SLICES)
def test_libtpu_knows_the_slices_that_we_list(chip: str) -> None:
    for name in SLICES[chip]:
        topology = parse_topology(f"{chip}:{name}")
        assert len(open_target(topology, cpu_fallback=False).devices) == topology.num_devices
    assert jax.default_backend() == "cpu"
