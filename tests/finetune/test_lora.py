"""Adapters: they start as nothing, are all that learns, learn the same on every mesh, and merge."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import Config
from mixtral_jax.finetune.surgery import drop_inputs, merge_adapters
from mixtral_jax.plan.hlo import parse_program
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.optimizer import make_optimizer
from mixtral_jax.training.state import TrainState, init_state
from mixtral_jax.training.step import TrainStep, make_train_step
from tests.cases import mesh_of, on_mesh, packed_batch, relative_norm, small_config

STEPS = 5
MESHES = {
    "expert=4,fsdp=2": {"expert": 4, "fsdp": 2},
    "fsdp=2,expert=2,tensor=2": {"fsdp": 2, "expert": 2, "tensor": 2},
}


def tuning_config(*, rank: int = 3, dropout: float = 0.0, **overrides: Any) -> Config:
    """Of four experts: loops over the experts of a device are most of what is to be compiled."""
    lora = {"rank": rank, "dropout": dropout, "targets": "attention+experts+router"}
    return small_config(finetune__lora=lora, **{"model__num_experts": 4, **overrides})


def prepare(config: Config) -> tuple[Training, TrainState, TrainStep]:
    tunable = make_training(config, "cpu")
    optimizer = make_optimizer(
        config.optimizer, lambda step: 1e-2, config.router.learning_rate_factor
    )
    state = init_state(tunable.make_model, optimizer, tunable.trainable)
    return (
        tunable,
        state,
        make_train_step(optimizer, config.router, lambda step: 1e-2, tunable.perturb),
    )


def logits_of(model: Any, config: Config) -> np.ndarray:
    batch = on_mesh(packed_batch(config), jax.sharding.get_mesh())
    apply = jax.jit(
        lambda model, batch: (
            model(batch.tokens[0], batch.positions[0], batch.segment_ids[0]).logits_BTV
        )
    )
    return np.asarray(apply(model, batch))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of `STEPS` steps: everything on the host."""

    losses: list[float]
    before: TrainState
    after: TrainState
    logits: np.ndarray
    merged_logits: np.ndarray


@functools.cache
def train(**sizes: int) -> Trained:
    # On one device a kernel that compiles sooner, and ought to give the same.
    config = tuning_config(
        dropout=0.3, dispatch__grouped_matmul="blocks" if sizes else "ragged_dot"
    )
    with jax.set_mesh(mesh_of(**sizes)), jax.default_matmul_precision("highest"):
        _, state, step = prepare(config)
        before, losses = jax.device_get(state), []
        batch = on_mesh(packed_batch(config), jax.sharding.get_mesh())
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        model = state.model()
        merged = jax.jit(merge_adapters)(model)
        assert not nnx.state(merged, nnx.LoRAParam)
        return Trained(
            losses,
            before,
            jax.device_get(state),
            logits_of(model, config),
            logits_of(merged, config),
        )


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [({}, "float32"), ({}, "bfloat16"), ({"expert": 2, "fsdp": 2, "tensor": 2}, "float32")],
    ids=["float32", "bfloat16", "float32 on a mesh"],
)
def test_fresh_adapters_change_no_bit(sizes: dict[str, int], dtype: str) -> None:
    config = tuning_config(model__dtype=dtype)
    with jax.set_mesh(mesh_of(**sizes)):
        tunable = make_training(config, "cpu")
        base = jax.jit(tunable.make_base)()
        adapted = jax.jit(tunable.adapt)(base)
        assert (
            len(jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))) == 2 * 8
        )  # A and B of each projection.
        assert logits_of(adapted, config).tobytes() == logits_of(base, config).tobytes()


def test_the_loss_falls_and_frozen_weights_keep_every_bit() -> None:
    run = train()
    assert run.losses[-1] < run.losses[0] - 0.2
    for before, after in zip(
        jax.tree.leaves(run.before.frozen), jax.tree.leaves(run.after.frozen), strict=True
    ):
        assert before.tobytes() == after.tobytes()
    for before, after in zip(
        jax.tree.leaves(run.before.trained), jax.tree.leaves(run.after.trained), strict=True
    ):
        assert not np.array_equal(before, after)


def test_the_optimizer_holds_state_for_adapters_alone() -> None:
    state = train().before
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.trained))
    assert all(3 in shape for shape in shapes)
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted([*shapes, *shapes])


def test_merged_weights_give_the_logits_of_adapters() -> None:
    run = train()
    np.testing.assert_allclose(
        run.merged_logits, run.logits, rtol=0, atol=1e-4
    )  # Logits are of order 1.


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_losses_with_dropout_are_the_same_on_every_mesh(sizes: dict[str, int]) -> None:
    assert train(**sizes).losses == pytest.approx(train().losses, rel=1e-5)


def test_merging_on_a_mesh_gives_the_same_weights_laid_out_as_before() -> None:
    config = tuning_config()
    merged = []
    for sizes in ({}, {"expert": 2, "fsdp": 2, "tensor": 2}):
        with jax.set_mesh(mesh_of(**sizes)):
            tunable, state, _ = prepare(config)
            ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / 8, state.trained)
            model = dataclasses.replace(state, trained=ones).model()
            merged.append(jax.jit(merge_adapters)(model))
            expected = jax.tree.leaves(jax.eval_shape(tunable.make_base))
            for got, leaf in zip(jax.tree.leaves(merged[-1]), expected, strict=True):
                assert got.sharding.spec == leaf.sharding.spec
    for one, other in zip(*map(jax.tree.leaves, merged), strict=True):
        assert relative_norm(other, one) < 1e-6


def test_the_merged_weight_is_rounded_once() -> None:
    config = tuning_config(finetune__frozen_dtype="bfloat16")
    with jax.set_mesh(mesh_of()):
        _, state, _ = prepare(config)
        ones = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1 / 64), state.trained)
        merged: Any = jax.jit(merge_adapters)(dataclasses.replace(state, trained=ones).model())
    weight = merged.blocks.moe.experts.down.weight[...]
    frozen = np.asarray(state.frozen.blocks.moe.experts.down.base.weight[...], np.float32)
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight, (frozen + 2 * 3 / 64**2).astype(jnp.bfloat16))


def test_no_gradient_of_a_frozen_weight_is_computed() -> None:
    def products(config: Config) -> set[tuple[int, ...]]:
        """Shapes of the results of all matmuls of a step, and of all sums."""
        with jax.set_mesh(mesh_of()):
            _, state, step = prepare(config)
            batch = on_mesh(packed_batch(config), jax.sharding.get_mesh())
            program = parse_program(step.lower(state, batch).compile().as_text() or "")
        found = [
            instruction
            for _, instruction, _ in program.instructions()
            if instruction.opcode in ("dot", "add")
        ]
        return {tuple(size for size in one.results[0].dimensions if size > 1) for one in found}

    weights, one = (
        {(32, 48), (48, 32)},
        {"model__num_experts": 1, "router__num_experts_per_token": 1},
    )
    assert products(tuning_config(rank=0, **one)) >= weights
    assert not products(tuning_config(**one)) & weights


def test_dropout_differs_between_steps_and_micro_batches_and_returns_with_them() -> None:
    config = tuning_config(dropout=0.5)
    with jax.set_mesh(mesh_of()):
        tunable, state, _ = prepare(config)
        draw = jax.jit(tunable.perturb)
        drawn = [
            draw(state.model(), step, micro) for step, micro in ((0, 0), (1, 0), (0, 1), (0, 0))
        ]
        first, *others, again = [
            np.asarray(model.blocks.attention.query.lora_a.weight[...]) for model in drawn
        ]
        assert all(not np.array_equal(first == 0, other == 0) for other in others)
        np.testing.assert_array_equal(first, again)
        # What is evaluated is the state's own model, which has nothing dropped.
        a: Any = state.trained.blocks.attention.query.lora_a.weight[...]
        assert (np.asarray(a) != 0).all()


def test_dropout_takes_whole_features_of_each_expert_and_makes_up_for_them() -> None:
    with jax.set_mesh(mesh_of()):
        _, state, _ = prepare(tuning_config())
        model: Any = state.model()
        dropped: Any = jax.jit(drop_inputs)(model, 0.25, jax.random.key(0))
    before, after = (
        np.asarray(one.blocks.moe.experts.gate.lora_a.weight[...]) for one in (model, dropped)
    )
    is_dropped_LED = (after == 0).all(axis=-1)
    np.testing.assert_allclose(
        after, np.where(is_dropped_LED[..., None], 0, before / 0.75), rtol=1e-6
    )
    assert is_dropped_LED.mean() == pytest.approx(
        0.25, abs=0.11
    )  # Of 256: four standard deviations.
    assert (
        len(np.unique(is_dropped_LED.reshape(8, -1), axis=0)) == 8
    )  # Each expert of each layer its own.
