"""Plans of a small model, compiled for eight virtual devices, equal sums by hand."""

import dataclasses
import functools

import jax
import pytest

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.plan.compile import StepMemory, fit_mesh
from mixtral_jax.plan.estimate import Plan, advise, make_plan
from mixtral_jax.plan.sweep import sweep
from mixtral_jax.plan.topology import Target, parse_topology
from tests.cases import cpu_model_maker, mesh_of, small_config

TARGET = Target(parse_topology("h100:8"), jax.devices(), "cpu")
# The tokens of one device, and the bytes of one row, with tests.cases.small_config.
TOKENS_PER_DEVICE = 24
ROW_BYTES = 32 * 4
# Each plan is compiled once, so tests share a few of them.
SPREAD = {"mesh__fsdp": 2, "mesh__expert": 2, "mesh__tensor": 2}
ADAPTERS = {
    "finetune__lora__rank": 4,
    "finetune__frozen_dtype": "bfloat16",
    "mesh__expert": 4,
    "mesh__fsdp": 2,
}


@functools.cache
def plan_of(**overrides: object) -> Plan:
    """The plan of the small config with some keys changed, compiled once."""
    settings = {"dispatch__transport": "all_gather", "model__remat": "full", **overrides}
    return make_plan(small_config(**settings), TARGET)


def sent(plan: Plan, op: str, axis: str, pass_: str) -> dict[str, tuple[int, int]]:
    chosen = (c for c in plan.collectives if (c.op, c.axis, c.pass_) == (op, axis, pass_))
    return {c.operand: (c.count, c.bytes_per_device) for c in chosen}


def test_tokens_and_routes_are_gathered_over_the_expert_axis() -> None:
    forward = sent(plan_of(), "all-gather", "expert", "forward")
    # Each of two layers sends to seven other devices.
    row_bytes = 2 * 7 * TOKENS_PER_DEVICE * ROW_BYTES
    assert forward["f32[24,32]"] == (2, row_bytes)
    assert forward["s32[24,2]"] == forward["f32[24,2]"] == (2, 2 * 7 * TOKENS_PER_DEVICE * 8)
    scattered = sent(plan_of(), "reduce-scatter", "expert", "forward")
    assert sum(size for _, size in scattered.values()) == row_bytes


def test_micro_batches_and_layers_multiply() -> None:
    plan = plan_of(train__batch_size=16, train__gradient_accumulation=2)
    forward = sent(plan, "all-gather", "expert", "forward")
    assert forward["f32[24,32]"] == (4, 4 * 7 * TOKENS_PER_DEVICE * ROW_BYTES)


def test_what_is_gathered_again_is_listed_apart() -> None:
    assert sent(plan_of(), "all-gather", "expert", "rematerialized")
    roomy = plan_of(model__remat="auto")
    assert roomy.to_json()["remat"] == "none"
    assert not any(c.pass_ == "rematerialized" for c in roomy.collectives)


def test_expert_weights_are_gathered_over_fsdp() -> None:
    plan = plan_of(**SPREAD)
    forward = sent(plan, "all-gather", "fsdp", "forward")
    # Four experts, half of the model dimension, half of the hidden one, float32.
    weights = 4 * 32 * 48 // 2 // 2 * 4
    expert_bytes = [
        size for _, size in forward.values() if size % weights == 0 and size >= 2 * weights
    ]
    assert sum(expert_bytes) == 3 * 2 * weights  # Three matrices in two layers.


def test_hardware_flops_are_those_of_a_count_by_hand() -> None:
    D, F, N, K, H, E, A, T, V = 32, 48, 4, 2, 12, 8, 2, 24, 96
    scores = 2 * N * H * T
    layer = 2 * D * (2 * N * H + 2 * K * H) + 2 * scores + 2 * D * E + 6 * D * F * A
    # A layer runs forward, once more (without the output of the experts) for rematerialisation, and
    # twice for the gradients, of which that of attention computes its scores again. The unembedding
    # is not recomputed.
    full, none = 4 * layer - 2 * D * F * A + scores, 3 * layer + scores
    assert plan_of().hardware_flops == 8 * T * (2 * full + 3 * 2 * D * V)
    assert plan_of(model__remat="auto").hardware_flops == 8 * T * (2 * none + 3 * 2 * D * V)


def test_hardware_flops_do_not_depend_on_accumulation_or_mesh() -> None:
    config = {"train__batch_size": 16, "train__gradient_accumulation": 2}
    assert plan_of(**config).hardware_flops == 2 * plan_of().hardware_flops
    assert plan_of(**SPREAD).hardware_flops == plan_of().hardware_flops


def test_model_flops_are_six_a_token_and_parameter_and_attention() -> None:
    config = small_config()
    with jax.set_mesh(mesh_of()):
        active = count_parameters(jax.eval_shape(cpu_model_maker(config))).active
    multiplied = active - 96 * 32  # All but the embedding look-up.
    attention = 2 * 4 * 12 * 24  # Two layers of four heads of size 12, over 24 tokens.
    assert plan_of().model_flops == 8 * 24 * 6 * (multiplied + attention)


def test_frozen_parameters_need_no_gradient_of_their_own() -> None:
    plan, full = plan_of(**ADAPTERS), plan_of()
    trained = plan.step.trained
    assert plan.step.parameters.total - trained.total == full.step.parameters.total
    weight_gradients = 8 * 24 * 2 * full.step.parameters.multiplying
    assert (
        plan.model_flops == full.model_flops - weight_gradients + 8 * 24 * 6 * trained.multiplying
    )
    # The program does not compute them either: a layer has its forward pass twice and gradients of
    # its inputs, but no gradients of frozen weights. Attention computes its scores five times.
    D, F, N, K, H, E, A, T, V = 32, 48, 4, 2, 12, 8, 2, 24, 96
    frozen, scores = 2 * D * (2 * N * H + 2 * K * H) + 2 * D * E + 6 * D * F * A, 2 * N * H * T
    adapters = 2 * trained.active // 2
    not_again = 2 * D * F * A
    by_hand = 8 * T * (2 * (3 * frozen - not_again + 9 * scores + 4 * adapters) + 2 * 2 * D * V)
    assert plan.hardware_flops == pytest.approx(by_hand, rel=0.01)


def test_a_plan_of_adapters_has_a_small_optimizer_and_counts_what_is_trained() -> None:
    plan = plan_of(**ADAPTERS)
    memory, trained = plan.step.memory, plan.step.trained.total
    # Frozen weights have 2 bytes each, and some are sharded. Adapters have 4 bytes each, and two
    # moments.
    assert memory.optimizer < 2 * 4 * trained
    assert memory.parameters < 2 * (plan.step.parameters.total - trained) + 4 * trained
    assert memory.rest > 0
    figures = plan.to_json()
    assert figures["trained_parameters"] == trained
    assert figures["fits"]


def test_parameters_of_a_device_are_its_shards() -> None:
    """Experts and dense weights are sharded over all eight devices; the rest is replicated."""
    memory, D, E, V, L = plan_of().step.memory, 32, 8, 96, 2
    whole = V * D + L * (D * E + 2 * D) + D
    assert memory.parameters == 4 * (whole + (plan_of().step.parameters.total - whole) // 8)
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=1e-3)


def test_the_peak_is_the_state_and_more() -> None:
    memory = plan_of().step.memory
    assert memory.peak > memory.parameters + memory.optimizer
    assert plan_of().fits


def test_json_has_what_scripts_rely_on() -> None:
    figures = plan_of().to_json()
    assert set(figures) >= {
        "topology",
        "num_devices",
        "mesh",
        "peak_bytes_per_device",
        "hbm_bytes_per_device",
        "fits",
        "model_flops_per_step",
        "hardware_flops_per_step",
        "compile_seconds",
        "collectives",
        "roofline",
    }
    assert set(figures["roofline"]) == {
        "compute_seconds",
        "hbm_seconds",
        "interconnect_seconds",
        "bound_by",
        "mfu_bound",
        "tokens_per_second_per_device",
    }
    assert figures["is_estimate"]
    assert figures["hidden_bytes_per_device"] is None
    assert figures["mesh"] == {"data": 1, "fsdp": 1, "expert": 8, "context": 1, "tensor": 1}
    assert all(
        set(c) >= {"op", "axis", "pass", "count", "bytes_per_device"}
        for c in figures["collectives"]
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mesh__expert": 4, "mesh__data": 1}, ["expert=4", "4 of 8", "h100:8", "expert=8"]),
        ({"mesh__fsdp": 3}, ["fsdp=3", "8 devices", "expert=8"]),
        ({"train__batch_size": 6}, ["train.batch_size", "multiple of 8"]),
        (
            {"train__batch_size": 12, "train__gradient_accumulation": 4},
            ["no mesh fits", "multiple of 32"],
        ),
    ],
)
def test_a_mesh_that_does_not_fill_the_topology_names_those_that_would(
    overrides: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(small_config(**overrides), TARGET)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_transport_that_the_chips_asked_for_lack_is_refused_though_a_cpu_has_it() -> None:
    config = small_config(
        dispatch__transport="ragged_all_to_all",
        model__num_experts=64,
        model__hidden_size=64,
        train__batch_size=64,
    )
    with pytest.raises(ConfigError, match=r"mesh\.expert=64 GPUs, more than 32: set all_to_all"):
        make_plan(config, Target(parse_topology("h100:64"), [], "cpu"))


def test_advice_is_to_accumulate_if_activations_do_not_fit_and_to_shard_if_the_state_does_not():
    config = fit_mesh(small_config(train__batch_size=16, mesh__data=2), TARGET)
    assert advise(config, StepMemory(peak=90, parameters=10, optimizer=20), 100, 8) == []
    activations = advise(config, StepMemory(peak=190, parameters=10, optimizer=20), 100, 8)
    assert activations[0].startswith("--config.train.gradient_accumulation=2")
    state = advise(config, StepMemory(peak=190, parameters=50, optimizer=100), 100, 8)
    assert state[0].startswith("--config.mesh.data=1 --config.mesh.fsdp=2")
    assert "16 devices" in state[-1]


def test_advice_is_to_keep_frozen_weights_in_bfloat16_if_they_are_not() -> None:
    memory = StepMemory(peak=190, parameters=150, optimizer=1)
    assert (
        "finetune.frozen_dtype=bfloat16"
        in advise(small_config(finetune__lora__rank=4), memory, 100, 8)[0]
    )
    for config in (
        small_config(),
        small_config(finetune__lora__rank=4, finetune__frozen_dtype="bfloat16"),
    ):
        assert not any("frozen" in line for line in advise(config, memory, 100, 8))


def test_a_sweep_ranks_what_fits_and_skips_batches_larger_than_one_that_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With made-up memory and speed: 16 sequences do not fit, and fewer experts are faster."""

    def plan_with_made_up_figures(config: Config, target: Target) -> Plan:
        plan, config = plan_of(), fit_mesh(config, target)
        peak = 2 * plan.hbm_bytes if config.train.batch_size > 8 else plan.step.memory.peak
        memory = dataclasses.replace(plan.step.memory, peak=peak)
        speed = 100.0 / config.mesh.expert
        return dataclasses.replace(
            plan,
            step=dataclasses.replace(plan.step, config=config, memory=memory),
            roofline=dataclasses.replace(plan.roofline, tokens_per_second_per_device=speed),
        )

    monkeypatch.setattr("mixtral_jax.plan.sweep.make_plan", plan_with_made_up_figures)
    lines: list[str] = []
    attempts = sweep(small_config(), TARGET, batch_sizes=[8, 16, 24], limit=3, say=lines.append)
    found = [
        (
            attempt.rank,
            attempt.plan.step.config.mesh.expert,
            attempt.plan.step.config.train.batch_size,
        )
        for attempt in attempts
    ]
    assert found == [(1, 4, 8), (2, 8, 8), (None, 8, 16)]
    assert len(lines) == 4
    assert "does not fit" in lines[1]
    assert "24 sequences: skipped, because 16 sequences did not fit" in lines[2]
    with pytest.raises(ConfigError, match="multiples of 8"):
        sweep(small_config(), TARGET, batch_sizes=[3], limit=3, say=lines.append)
