"""What is trained: presets, patterns, the router, and the table that shows it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import ConfigError, FinetuneConfig, build
from mixtral_jax.finetune.targets import match_targets
from mixtral_jax.finetune.trained import describe_trained, list_parts
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.training.assemble import make_training
from mixtral_jax.training.optimizer import make_optimizer
from mixtral_jax.training.state import TrainState, abstract_state, init_state
from tests.cases import mesh_of, small_config

ATTENTION = ["attention.key", "attention.out", "attention.query", "attention.value"]
EXPERTS = ["moe.experts.down", "moe.experts.gate", "moe.experts.up"]
NAMES = [*ATTENTION, *EXPERTS, "moe.router.gate"]


def shapes_of(factor: float = 1.0, **finetune: Any) -> tuple[Any, Any]:
    """The shapes of the tuned model, and the filter for its trained parameters."""
    config = small_config(finetune=finetune, router__learning_rate_factor=factor)
    training = make_training(config, "cpu")
    with jax.set_mesh(mesh_of()):
        return jax.eval_shape(training.make_model), training.trainable


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", ATTENTION),
        ("attention+experts", [*ATTENTION, *EXPERTS]),
        ("attention+experts+router", NAMES),
        ("moe.experts.down", ["moe.experts.down"]),
        ("attention.query, *.gate", ["attention.query", "moe.experts.gate", "moe.router.gate"]),
        ("attention,moe.router.*", [*ATTENTION, "moe.router.gate"]),
    ],
)
def test_presets_and_patterns_choose_projections(targets: str, expected: list[str]) -> None:
    model, trainable = shapes_of(lora={"targets": targets})
    assert [part.name for part in list_parts(model, trainable) if part.trained] == expected


def test_the_default_is_attention_and_experts_at_rank_16_and_scaling_2() -> None:
    config = build(FinetuneConfig, {})
    assert match_targets(config.lora.targets, NAMES, 1.0) == [*ATTENTION, *EXPERTS]
    assert (config.lora.rank, config.lora.scaling) == (16, 2.0)
    assert build(FinetuneConfig, {"lora": {"rank": 64, "alpha": "16"}}).lora.scaling == 0.25


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        (
            {"lora": {"targets": "q_proj,attention.*"}},
            ["'q_proj' matches no projection", "attention.query", "moe.experts"],
        ),
        ({"lora": {"targets": "attentoin"}}, ["'attentoin'", "attention+experts+router"]),
        ({"lora": {"targets": ""}}, ["'' matches no projection"]),
        ({"factor": 0.1}, ["no effect", "attention+experts+router"]),
        ({"factor": 0, "lora": {"targets": "*"}}, ["freezes the router", "targets=*"]),
    ],
)
def test_targets_that_match_nothing_are_an_error_that_lists_what_would_match(
    finetune: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        shapes_of(**finetune)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        ({"lora": {"rank": -1}}, ["finetune.lora.rank=-1", "at least 1, or 0"]),
        ({"lora": {"alpha": 0}}, ["finetune.lora.alpha=0.0", "positive"]),
        ({"lora": {"dropout": 1}}, ["finetune.lora.dropout=1.0", "[0, 1)"]),
        ({"lora": {"rank": 0, "dropout": 0.1}}, ["needs adapters"]),
        (
            {"lora": {"rank": 0}, "frozen_dtype": "bfloat16"},
            ["finetune.frozen_dtype=bfloat16", "is for adapters"],
        ),
        ({"base": ""}, ["finetune.base"]),
        ({"lora": {"r": 8}}, ["unknown config key finetune.lora.r", "rank"]),
    ],
)
def test_a_wrong_setting_is_named(finetune: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        small_config(finetune=finetune)
    for word in words:
        assert word in str(error.value)


def test_adapters_are_counted_apart_from_what_they_adapt() -> None:
    model, trainable = shapes_of(lora={"rank": 3, "targets": "attention.query,moe.experts.down"})
    # Two layers; D=32, four heads of 12; eight experts, F=48.
    query, down = 2 * 3 * (32 + 4 * 12), 2 * 8 * 3 * (48 + 32)
    trained = {part.name: part.trained for part in list_parts(model, trainable) if part.trained}
    assert trained == {"attention.query": query, "moe.experts.down": down}
    frozen = count_parameters(model).total - query - down
    plain, everything = shapes_of(lora={"rank": 0})
    assert frozen == count_parameters(plain, everything).total
    table = describe_trained(model, trainable)
    assert f"{down:,}" in table and f"{frozen:,}" in table and "embedding_VD" in table
    assert all(len(line) <= 120 for line in table.splitlines())


def test_frozen_weights_may_be_bfloat16_while_adapters_and_their_moments_are_float32() -> None:
    config = small_config(finetune__frozen_dtype="bfloat16")
    training = make_training(config, "cpu")
    with jax.set_mesh(mesh_of(expert=4, fsdp=2)):
        optimizer = make_optimizer(
            config.optimizer, lambda step: 1.0, config.router.learning_rate_factor
        )
        state = abstract_state(training.make_model, optimizer, training.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16")}
    trained = [leaf for leaf in jax.tree.leaves((state.trained, state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in trained} == {jnp.dtype("float32")}
    # Cut as what they adapt: over experts, and over the model dimension; the rank is not.
    down, gate = state.trained.blocks.moe.experts.down, state.trained.blocks.moe.experts.gate
    assert gate.lora_a.weight.get_value().sharding.spec == jax.P(None, "expert", "fsdp", None)
    assert gate.lora_b.weight.get_value().sharding.spec == jax.P(None, "expert", None, "tensor")
    assert down.lora_a.weight.get_value().sharding.spec == jax.P(None, "expert", "tensor", None)
    assert down.lora_b.weight.get_value().sharding.spec == jax.P(None, "expert", None, "fsdp")


def updates_of(config_overrides: dict[str, Any]) -> dict[str, float]:
    """The largest first update of each trained leaf, for gradients that are all one."""
    config = small_config(**config_overrides)
    training = make_training(config, "cpu")
    with jax.set_mesh(mesh_of()):
        optimizer = make_optimizer(
            config.optimizer, lambda step: 1.0, config.router.learning_rate_factor
        )
        state = jax.eval_shape(
            lambda: TrainState.create(training.make_model(), optimizer, training.trainable)
        )
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state.trained)
        updates, _ = jax.jit(lambda ones: optimizer.update(ones, optimizer.init(ones), ones))(ones)
    return {
        jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree.flatten_with_path(updates)[0]
    }


ALL = {"targets": "attention+experts+router"}
FEW = {"targets": "attention.out,moe.router.gate"}


@pytest.mark.parametrize(
    ("lora", "optimizer"),
    [({"rank": 0}, "adamw"), (ALL, "adamw"), (FEW, "adafactor"), (FEW, "muon")],
    ids=["full", "adapters", "adapters, adafactor", "adapters, muon"],
)
def test_the_router_learns_at_its_own_rate(lora: dict[str, Any], optimizer: str) -> None:
    settings = {"finetune": {"lora": lora}, "optimizer__name": optimizer}
    slow = updates_of({**settings, "router": {"learning_rate_factor": 0.25}})
    normal = updates_of(settings)
    assert slow.keys() == normal.keys()
    for name, size in normal.items():
        assert slow[name] == pytest.approx(size * (0.25 if "router" in name else 1.0), rel=1e-6), (
            name
        )


def test_a_frozen_router_has_no_state_in_the_optimizer() -> None:
    frozen = updates_of({"finetune": {"lora": {"rank": 0}}, "router": {"learning_rate_factor": 0}})
    full = updates_of({"finetune": {"lora": {"rank": 0}}})
    assert full.keys() - frozen.keys() == {name for name in full if "router" in name} != set()


def test_both_halves_of_an_adapter_decay() -> None:
    decay = {"finetune": {"lora": {"targets": "attention"}}, "optimizer__max_grad_norm": 1e-30}
    # The gradients are almost zero, so an update consists of the decay; the weights are all one.
    assert set(updates_of({**decay, "optimizer__weight_decay": 0.5}).values()) == {0.5}


def test_an_existing_base_is_tuned_in_place() -> None:
    config = small_config(finetune__lora={"rank": 4, "targets": "attention"})
    training = make_training(config, "cpu")
    optimizer = make_optimizer(
        config.optimizer, lambda step: 1.0, config.router.learning_rate_factor
    )
    with jax.set_mesh(mesh_of()):
        base, expected = (jax.jit(training.make_base)() for _ in range(2))
        state = init_state(training.adapt, optimizer, training.trainable, base)
    # There is no second copy of the base.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(base))
    for got, leaf in zip(
        jax.tree.leaves(state.frozen), jax.tree.leaves(nnx.state(expected)), strict=True
    ):
        np.testing.assert_array_equal(got, leaf)
    assert len(jax.tree.leaves(state.trained)) == 2 * 4
