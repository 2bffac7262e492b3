"""Adapters add nothing at first, are all that is trained, train alike on every mesh, and merge."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.checkpoint.merged import merge
from mixtral_jax.checkpoint.on_devices import load_model, parameter_name
from mixtral_jax.config import Config, GroupedMatmulName
from mixtral_jax.finetune.adapters import drop_adapter_inputs
from mixtral_jax.plan.hlo import parse_program
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.optimizer import make_optimizer
from mixtral_jax.training.state import TrainState
from tests.cases import mesh_of, on_mesh, packed_batch, small_config
from tests.checkpoint.folders import store_array

STEPS = 5


def tuning_config(*, rank: int = 3, dropout: float = 0.0, **overrides: Any) -> Config:
    """A config with four experts, since compiling takes longest for loops over experts."""
    lora: dict[str, Any] = {"rank": rank}
    if rank:
        lora |= {"dropout": dropout, "targets": "attention+experts+router"}
    return small_config(finetune__lora=lora, **{"model__num_experts": 4, **overrides})


def prepare(config: Config) -> Training:
    factor = config.router.learning_rate_factor
    optimizer = make_optimizer(config.optimizer, lambda step: 1e-2, factor)
    return make_training(config, "cpu", optimizer=optimizer)


def logits_of(model: Any, config: Config) -> np.ndarray:
    batch = on_mesh(packed_batch(config), jax.sharding.get_mesh())
    apply = jax.jit(
        lambda model, batch: (
            model(batch.tokens[0], batch.positions[0], batch.segment_ids[0]).logits_BTV
        )
    )
    return np.asarray(apply(model, batch))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with adapters, and the training that made it."""

    training: Training
    model: Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of `STEPS` steps, with its states on the host."""

    losses: list[float]
    before: TrainState
    after: TrainState


def trained_config(kernel: GroupedMatmulName = "ragged_dot") -> Config:
    return tuning_config(dropout=0.3, dispatch__grouped_matmul=kernel)


@functools.cache
def train(kernel: GroupedMatmulName = "ragged_dot", **sizes: int) -> Trained:
    config = trained_config(kernel)
    with jax.set_mesh(mesh_of(**sizes)), jax.default_matmul_precision("highest"):
        training = prepare(config)
        state = training.init()
        before, losses = jax.device_get(state), []
        batch = on_mesh(packed_batch(config), jax.sharding.get_mesh())
        for _ in range(STEPS):
            state, metrics = training.train_step(state, batch)
            losses.append(float(metrics["loss"]))
        return Trained(losses, before, jax.device_get(state))


@functools.cache
def adapted_model() -> Model:
    """A training with dropout, and its new model on one device."""
    with jax.set_mesh(mesh_of()):
        training = prepare(tuning_config(dropout=0.5))
        return Model(training, training.init().model())


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        pytest.param({}, "float32", id="float32"),
        pytest.param({}, "bfloat16", id="bfloat16"),
        pytest.param(
            {"expert": 2, "fsdp": 2, "tensor": 2},
            "float32",
            id="float32 on a mesh",
            marks=pytest.mark.meshes,
        ),
    ],
)
def test_fresh_adapters_change_no_bit(sizes: dict[str, int], dtype: str) -> None:
    config = tuning_config(model__dtype=dtype)
    with jax.set_mesh(mesh_of(**sizes)):
        training = make_training(config, "cpu")
        base = jax.jit(training.make_base)()
        adapted = jax.jit(training.adapt)(base)
        # A and B of each projection.
        assert len(jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))) == 2 * 8
        assert logits_of(adapted, config).tobytes() == logits_of(base, config).tobytes()


def test_the_loss_falls_and_frozen_weights_keep_every_bit() -> None:
    run = train()
    assert run.losses[-1] < run.losses[0] - 0.2
    frozen = (jax.tree.leaves(state.frozen) for state in (run.before, run.after))
    for before, after in zip(*frozen, strict=True):
        assert before.tobytes() == after.tobytes()
    trained = (jax.tree.leaves(state.trained) for state in (run.before, run.after))
    for before, after in zip(*trained, strict=True):
        assert not np.array_equal(before, after)


def test_the_optimizer_holds_state_for_adapters_alone() -> None:
    state = train().before
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.trained))
    assert all(3 in shape for shape in shapes)
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted([*shapes, *shapes])


def test_merged_weights_give_the_logits_of_adapters() -> None:
    """Merged as `checkpoint` merges them when it reads a run."""
    config = trained_config()
    assert config.finetune is not None
    scaling, training = config.finetune.lora.scaling, make_training(config, "cpu")
    leaves = jax.tree.flatten_with_path(train().after.model())[0]
    stored = {parameter_name(path): store_array(np.asarray(leaf)) for path, leaf in leaves}
    with jax.set_mesh(mesh_of()), jax.default_matmul_precision("highest"):
        expected = logits_of(load_model(stored, jax.eval_shape(training.make_model)), config)
        for name in [name for name in stored if name.endswith("base/weight")]:
            adapted = name.removesuffix("base/weight")
            a, b = (stored.pop(f"{adapted}{half}/weight") for half in ("lora_a", "lora_b"))
            stored[f"{adapted}weight"] = merge(stored.pop(name), a, b, scaling)
        merged = logits_of(load_model(stored, jax.eval_shape(training.make_base)), config)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-4)  # Logits are of order 1.


@pytest.mark.meshes
@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [({"expert": 4, "fsdp": 2}, "ragged_dot"), ({"fsdp": 2, "expert": 2, "tensor": 2}, "blocks")],
    ids=["expert=4,fsdp=2", "fsdp=2,expert=2,tensor=2"],
)
def test_losses_with_dropout_are_the_same_on_every_mesh(
    sizes: dict[str, int], kernel: GroupedMatmulName
) -> None:
    assert train(kernel, **sizes).losses == pytest.approx(train().losses, rel=1e-5)


def test_no_gradient_of_a_frozen_weight_is_computed() -> None:
    def products(config: Config) -> set[tuple[int, ...]]:
        """The shapes of the results of all matmuls and additions in a step."""
        with jax.set_mesh(mesh_of()):
            training = prepare(config)
            batch = on_mesh(packed_batch(config), jax.sharding.get_mesh())
            compiled = training.train_step.lower(training.abstract_state(), batch).compile()
        program = parse_program(compiled.as_text() or "")
        found = [
            instruction
            for _, instruction, _ in program.instructions()
            if instruction.opcode in ("dot", "add")
        ]
        return {tuple(size for size in one.results[0].dimensions if size > 1) for one in found}

    weights = {(32, 48), (48, 32)}
    one: dict[str, Any] = {"model__num_experts": 1, "router__num_experts_per_token": 1}
    assert products(tuning_config(rank=0, **one)) >= weights
    assert not products(tuning_config(**one)) & weights


def test_dropout_differs_between_steps_and_micro_batches_and_returns_with_them() -> None:
    training, model = adapted_model().training, adapted_model().model
    with jax.set_mesh(mesh_of()):
        draw = jax.jit(training.perturb)
        drawn = [draw(model, step, micro) for step, micro in ((0, 0), (1, 0), (0, 1), (0, 0))]
        first, *others, again = [
            np.asarray(model.blocks.attention.query.lora_a.weight[...]) for model in drawn
        ]
        assert all(not np.array_equal(first == 0, other == 0) for other in others)
        np.testing.assert_array_equal(first, again)
        # Evaluation uses the model itself, in which nothing is dropped.
        assert (np.asarray(model.blocks.attention.query.lora_a.weight[...]) != 0).all()


def test_dropout_drops_whole_features_of_each_expert_and_scales_the_others_up() -> None:
    model = adapted_model().model
    with jax.set_mesh(mesh_of()):
        drop = jax.jit(functools.partial(drop_adapter_inputs, config=tuning_config(dropout=0.25)))
        dropped: Any = drop(model, key=jax.random.key(0))
    before, after = (
        np.asarray(one.blocks.moe.experts.gate.lora_a.weight[...]) for one in (model, dropped)
    )
    is_dropped_LED = (after == 0).all(axis=-1)
    np.testing.assert_allclose(
        after, np.where(is_dropped_LED[..., None], 0, before / 0.75), rtol=1e-6
    )
    # There are 256 features, so the tolerance is four standard deviations.
    assert is_dropped_LED.mean() == pytest.approx(0.25, abs=0.11)
    # Each expert of each layer drops other features.
    assert len(np.unique(is_dropped_LED.reshape(8, -1), axis=0)) == 8
