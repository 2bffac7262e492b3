"""Experts that every token visits, and fine-grained ones: against numpy, on every mesh, in every
count.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint.formats.architecture import require_mixtral
from mixtral_jax.checkpoint.formats.parameters import parameter_shape, parameters_of
from mixtral_jax.checkpoint.on_devices import parameter_name
from mixtral_jax.config import Config, ConfigError, build, changed_keys
from mixtral_jax.finetune.targets import PRESETS
from mixtral_jax.finetune.trained import list_parts
from mixtral_jax.generate.generator import Generator
from mixtral_jax.generate.settings import Settings
from mixtral_jax.model.dispatch.transports import TRANSPORTS
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.plan.flops import model_flops_per_step
from mixtral_jax.runs.describe import describe_experts_per_token
from mixtral_jax.training.assemble import make_training
from tests.cases import (
    RULES,
    cpu_model_maker,
    mesh_of,
    on_mesh,
    packed_batch,
    relative_norm,
    small_config,
)
from tests.checkpoint.folders import architecture_of
from tests.reference import reference_logits, swiglu

SHARED = {"model__num_shared_experts": 3}
ALL_AXES = {"fsdp": 2, "expert": 2, "tensor": 2}
FINE = {"model__granularity": 4, "model__num_shared_experts": 1}


def make(config, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(cpu_model_maker(config))()


def shapes_of(config: Config) -> Any:
    with jax.set_mesh(mesh_of()):
        return jax.eval_shape(cpu_model_maker(config))


def logits_of(model, mesh, batch):
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        rows = jax.NamedSharding(mesh, RULES.spec("batch", None))
        tokens, positions, segments = (
            jax.device_put(x[0], rows) for x in (batch.tokens, batch.positions, batch.segment_ids)
        )
        return np.asarray(
            jax.jit(lambda model, *args: model(*args))(
                model, tokens, positions, segments
            ).logits_BTV
        )


@pytest.mark.parametrize(
    ("sizes", "transport", "changes"),
    [
        ({"expert": 4, "fsdp": 2}, "ragged_all_to_all", FINE),
        (ALL_AXES, "all_to_all", SHARED),
        pytest.param({"expert": 4, "fsdp": 2}, "all_gather", SHARED, marks=pytest.mark.meshes),
        pytest.param(ALL_AXES, "ragged_all_to_all", FINE, marks=pytest.mark.meshes),
    ],
)
def test_logits_are_those_of_numpy_on_every_mesh_and_transport(sizes, transport, changes):
    # The transport of a config depends on its own mesh.
    places = {f"mesh__{axis}": size for axis, size in sizes.items()}
    config = small_config(dispatch__transport=transport, **places, **changes)
    mesh = mesh_of(**sizes)
    model, batch = make(config, mesh), packed_batch(config)
    assert model.blocks.moe.transport == TRANSPORTS[transport](config.model.num_experts, None)
    expected = reference_logits(model, batch.tokens[0], batch.positions[0], batch.segment_ids[0])
    real = batch.segment_ids[0] > 0
    np.testing.assert_allclose(
        logits_of(model, mesh, batch)[real], expected[real], atol=2e-4, rtol=0
    )


@pytest.mark.meshes
def test_gradients_are_the_same_on_a_mesh_of_all_axes():
    config = small_config(
        dispatch__grouped_matmul="ragged_dot", **SHARED
    )  # The quickest to compile.
    batch = packed_batch(config)

    def gradients(**sizes):
        mesh = mesh_of(**sizes)
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            micro = jax.tree.map(lambda rows: rows[0], on_mesh(batch, mesh))

            def loss(model):
                return (
                    model(micro.tokens, micro.positions, micro.segment_ids).logits_BTV ** 2
                ).mean()

            return jax.tree.flatten_with_path(jax.jit(jax.grad(loss))(make(config, mesh)))[0]

    for (path, got), (_, one) in zip(
        gradients(fsdp=2, expert=2, tensor=2), gradients(), strict=True
    ):
        assert relative_norm(got, one) < 1e-5, jax.tree_util.keystr(path)


def test_n_shared_experts_are_the_sum_of_n_swiglus():
    x, gate, up, down = (
        np.random.default_rng(0).normal(size=s) for s in ((5, 8), (8, 6), (8, 6), (6, 8))
    )
    parts = [slice(start, start + 2) for start in (0, 2, 4)]
    each = sum(swiglu(x, gate[:, part], up[:, part], down[part]) for part in parts)
    np.testing.assert_allclose(swiglu(x, gate, up, down), each, rtol=1e-12)


def test_all_other_parameters_start_as_without_them():
    models = (make(small_config(model__num_shared_experts=shared), mesh_of()) for shared in (0, 2))
    without, with_them = (
        {parameter_name(path): leaf for path, leaf in jax.tree.flatten_with_path(model)[0]}
        for model in models
    )
    added = with_them.keys() - without.keys()
    assert added == {f"blocks/moe/shared_experts/{name}/weight" for name in ("gate", "up", "down")}
    for name, leaf in without.items():
        np.testing.assert_array_equal(leaf, with_them[name], err_msg=name)


def test_shared_parameters_are_all_active_and_counted_everywhere():
    plain, config = small_config(), small_config(**SHARED)
    more = 3 * 3 * 32 * 48 * 2  # Three matrices of three experts, in two layers.
    before, after = (count_parameters(shapes_of(c)) for c in (plain, config))
    assert (after.total - before.total, after.active - before.active) == (more, more)
    assert after.multiplying - before.multiplying == more
    tokens = config.train.batch_size * config.train.sequence_length
    flops = [
        model_flops_per_step(c, count, count) for c, count in ((plain, before), (config, after))
    ]
    assert flops[1] - flops[0] == 6 * more * tokens
    assert describe_experts_per_token(config) == "top-2 of 8 experts, and 3 shared"
    assert describe_experts_per_token(plain) == "top-2 of 8 experts"


@pytest.mark.parametrize("changes", [{}, SHARED, FINE])
def test_the_table_of_parameters_is_that_of_the_model(changes):
    config = small_config(**changes)
    leaves = jax.tree.flatten_with_path(shapes_of(config))[0]
    assert {parameter_name(path): leaf.shape for path, leaf in leaves} == {
        name: parameter_shape(name, config.model)
        for name in parameters_of(config.model, config.router)
    }


def test_a_dense_layer_lies_on_a_mesh_as_attention_does():
    shared = make(
        small_config(**SHARED), mesh_of(fsdp=2, expert=2, tensor=2)
    ).blocks.moe.shared_experts
    for leaf in jax.tree.leaves(shared):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}


def test_presets_adapt_shared_experts_with_the_others():
    for targets in PRESETS:
        config = small_config(finetune__lora={"targets": targets, "rank": 2}, **SHARED)
        tunable = make_training(config, "cpu")
        with jax.set_mesh(mesh_of()):
            parts = list_parts(jax.eval_shape(tunable.make_model), tunable.trainable)
        adapted = {part.name for part in parts if part.trained and "shared_experts" in part.name}
        assert len(adapted) == (3 if "experts" in targets else 0)


def test_adapters_on_shared_experts_add_nothing_at_first():
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    config = small_config(finetune__lora={"rank": 2}, **SHARED)
    tunable, batch = make_training(config, "cpu"), packed_batch(config)
    with jax.set_mesh(mesh):
        plain, adapted = jax.jit(tunable.make_base)(), jax.jit(tunable.make_model)()
    np.testing.assert_array_equal(logits_of(adapted, mesh, batch), logits_of(plain, mesh, batch))


def test_greedy_is_the_same_with_and_without_cache():
    mesh, config = mesh_of(), small_config(**FINE)
    model, prompt = make(config, mesh), [5, 9, 2, 60]
    with jax.set_mesh(mesh):
        row = Generator(model, mesh, None, 64).generate([prompt], Settings.of(max_new_tokens=6))[0]
    ids = list(prompt)
    for _ in range(6):
        batch = dataclasses.replace(packed_batch(config), tokens=np.zeros((1, 1, 10), np.int32))
        batch.tokens[0, 0, : len(ids)] = ids
        batch = dataclasses.replace(
            batch, positions=np.arange(10)[None, None], segment_ids=np.ones((1, 1, 10), int)
        )
        ids.append(int(logits_of(model, mesh, batch)[0, len(ids) - 1].argmax()))
    assert row.ids == ids[len(prompt) :]


def test_an_export_names_the_key_that_others_have_no_word_for():
    architecture = architecture_of(small_config(**SHARED).model)
    with pytest.raises(ConfigError, match=r"cannot have model\.num_shared_experts=3$"):
        require_mixtral(architecture)
    require_mixtral(
        architecture_of(small_config(model__granularity=4).model, chosen=8)
    )  # A Mixtral of more experts.


def test_granularity_is_written_out_once():
    config = small_config(model__granularity="4")
    model, plain = config.model, small_config().model
    assert (model.num_experts, model.intermediate_size, model.granularity) == (32, 12, 1)
    assert config.router.num_experts_per_token == 8
    fine, coarse = (count_parameters(shapes_of(c)) for c in (config, small_config()))
    of_router = plain.num_layers * plain.hidden_size * (32 - 8)
    assert (fine.total - coarse.total, fine.active - coarse.active) == (of_router, of_router)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert build(Config, saved) == config
    # What a resumed run is compared by.
    assert changed_keys(saved, dataclasses.asdict(small_config(model__granularity=4))) == []
    changed = changed_keys(saved, dataclasses.asdict(small_config(model__granularity=2)))
    assert [change.split(" ")[0] for change in changed] == [
        "model.intermediate_size",
        "model.num_experts",
        "router.num_experts_per_token",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__granularity": 5}, ["model.granularity=5", "divide model.intermediate_size=48"]),
        ({"model__granularity": 0}, ["model.granularity=0", "at least 1"]),
        ({"model__num_shared_experts": -1}, ["model.num_shared_experts=-1"]),
    ],
)
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(ConfigError) as error:
        small_config(**changes)
    for word in words:
        assert word in str(error.value)
