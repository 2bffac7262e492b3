"""The decoder against a numpy reference, and what must hold of any decoder."""

import jax
import numpy as np
import pytest

from configs import models
from mixtral_jax.config import Config, build
from mixtral_jax.model.training_mode import enter_training
from mixtral_jax.model.transformer import count_parameters
from tests.cases import RULES, cpu_model_maker, mesh_of, packed_batch, small_config
from tests.reference import reference_logits


def make(config, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(cpu_model_maker(config))()


@jax.jit
def apply(model, tokens, positions, segments):
    return model(tokens, positions, segments)


def run(model, mesh, tokens, positions, segments):
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        rows = jax.NamedSharding(mesh, RULES.spec("batch", None))
        return apply(model, *(jax.device_put(x, rows) for x in (tokens, positions, segments)))


def micro(batch):
    return batch.tokens[0], batch.positions[0], batch.segment_ids[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dispatch__capacity_factor": 1.0},
        {"router__num_experts_per_token": 8},
        {
            "router__num_experts_per_token": 1,
            "model__num_experts": 6,
            "model__num_kv_heads": 1,
            "model__rope_theta": 1e4,
        },
    ],
)
def test_logits_are_those_of_loops_over_experts_in_numpy(changes):
    config, mesh = small_config(**changes), mesh_of()
    model, batch = make(config, mesh), packed_batch(small_config(**changes))
    got = run(model, mesh, *micro(batch)).logits_BTV
    expected = reference_logits(
        model, *micro(batch), capacity_factor=config.dispatch.capacity_factor
    )
    real = batch.segment_ids[0] > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def small():
    config, mesh = small_config(), mesh_of()
    return make(config, mesh), mesh, packed_batch(config)


def test_later_tokens_never_change_earlier_logits(small):
    model, mesh, batch = small
    tokens, positions, segments = micro(batch)
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 96
    before, after = (run(model, mesh, t, positions, segments).logits_BTV for t in (tokens, changed))
    # Not bit for bit: later tokens decide in which block of an expert's rows an earlier one is
    # multiplied.
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=2e-6)
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.01


def test_padding_changes_nothing(small):
    model, mesh, batch = small
    tokens, positions, segments = micro(batch)
    changed = np.where(segments > 0, tokens, (tokens + 7) % 96)
    before, after = (run(model, mesh, t, positions, segments) for t in (tokens, changed))
    real = segments > 0
    np.testing.assert_array_equal(
        np.asarray(before.logits_BTV)[real], np.asarray(after.logits_BTV)[real]
    )
    jax.tree.map(np.testing.assert_array_equal, before.routing.sums, after.routing.sums)
    assert not np.asarray(before.routing.is_kept_BTA)[:, segments == 0].any()


def test_a_packed_document_sees_what_it_sees_alone(small):
    model, mesh, batch = small
    tokens, positions, segments = micro(batch)
    packed = run(model, mesh, tokens, positions, segments).logits_BTV
    inside = segments[2] == 2
    length = int(inside.sum())
    alone = np.zeros_like(tokens), np.zeros_like(positions), np.zeros_like(segments)
    alone[0][0, :length], alone[1][0, :length], alone[2][0, :length] = (
        tokens[2][inside],
        np.arange(length),
        1,
    )
    np.testing.assert_allclose(
        run(model, mesh, *alone).logits_BTV[0, :length], packed[2][inside], atol=1e-5
    )


def test_remat_policies_give_the_same_gradient(small):
    _, mesh, batch = small
    gradients = []
    for policy in ("full", "dots", "none"):
        model = make(small_config(model__remat=policy, router__noise__gumbel=1.0), mesh)
        with jax.set_mesh(mesh):
            model = enter_training(model, jax.random.key(0))
            loss = jax.jit(
                jax.grad(lambda m: (m(*micro(batch)).logits_BTV ** 2).mean(), allow_int=True)
            )
            gradients.append(jax.tree.leaves(loss(model)))
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0], strict=True):
            if got.dtype != jax.dtypes.float0:  # A random key has no gradient.
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_bfloat16_logits_are_near_those_of_float32(small):
    model, mesh, batch = small
    rounded = make(small_config(model__dtype="bfloat16"), mesh)
    got, expected = (run(m, mesh, *micro(batch)).logits_BTV for m in (rounded, model))
    assert got.dtype == "bfloat16"
    error = np.asarray(got, np.float32) - np.asarray(expected)
    assert np.sqrt((error**2).mean()) < 0.05 * np.asarray(expected).std()


@pytest.mark.parametrize(
    ("size", "total", "active"),
    [
        (models.mixtral_8x7b, 46_702_792_704, 12_879_925_248),
        (models.mixtral_8x22b, 140_620_634_112, 39_152_031_744),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(size, total, active):
    train = {"num_steps": 1, "batch_size": 8, "sequence_length": 8}
    config = build(Config, {"model": size().to_dict(), "train": train})
    with jax.set_mesh(mesh_of(expert=8)):
        count = count_parameters(jax.eval_shape(cpu_model_maker(config)))
    assert (count.total, count.active) == (total, active)
    assert (
        active - count.multiplying == config.model.vocab_size * config.model.hidden_size
    )  # The look-up.


def test_each_device_holds_only_its_experts():
    config = small_config()
    for mesh, share in (
        (mesh_of(expert=8), 8),
        (mesh_of(expert=4, fsdp=2), 8),
        (mesh_of(data=2, expert=2, tensor=2), 4),
    ):
        experts = make(config, mesh).blocks.moe.experts
        for leaf in jax.tree.leaves(experts):
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {
                leaf.nbytes // share
            }
