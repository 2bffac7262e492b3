"""Experts made from a dense model: what they compute, what is new in them, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint.on_devices import parameter_name
from mixtral_jax.checkpoint.upcycled import copy_experts
from mixtral_jax.checkpoint.weights import Weights
from mixtral_jax.config import ChatConfig, Config, ConfigError, PretrainConfig
from mixtral_jax.finetune.upcycling import choose_units, redraw
from mixtral_jax.runs.base import Base, plan_base
from mixtral_jax.runs.upcycle import dense_loader, find_misfits, plan_dense
from tests.cases import RULES, cpu_model_maker, make_run, mesh_of, packed_batch, small_config
from tests.checkpoint.folders import architecture_of, in_memory, random_parameters
from tests.reference import mixture, rms_norm, swiglu

MESHES = ({}, {"expert": 4, "fsdp": 2}, {"fsdp": 2, "expert": 2, "tensor": 2})
DENSE = small_config(model__num_experts=1, router__num_experts_per_token=1).model
WEIGHTS = {name: 0.2 * numbers for name, numbers in random_parameters(DENSE).items()}
EXPERTS = {name: f"blocks/moe/experts/{name}/weight" for name in ("gate", "up", "down")}


def config_of(**changes: Any) -> Config:
    return small_config(
        **{f"upcycle__{key}" if "__" not in key else key: value for key, value in changes.items()}
    )


def upcycled(sizes: dict[str, int], **changes: Any) -> Any:
    """The model that a run with this config starts from, on a mesh of these sizes."""
    config, mesh = config_of(**changes), mesh_of(**sizes)
    weights = Weights(architecture_of(DENSE, 1), in_memory(WEIGHTS, DENSE), None, "memory")
    tokenizer: Any = None
    run = make_run(config, mesh, Path("run"))
    with jax.set_mesh(mesh):
        return dense_loader(Base(Path("dense"), weights, tokenizer), run)()


def parameters_of(model: Any) -> dict[str, np.ndarray]:
    return {
        parameter_name(path): np.asarray(leaf)
        for path, leaf in jax.tree.flatten_with_path(model)[0]
    }


def logits_of(model: Any, batch: Any) -> np.ndarray:
    mesh = model.embedding_VD[...].sharding.mesh
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        rows = jax.NamedSharding(mesh, RULES.spec("batch", None))
        inputs = (
            jax.device_put(x[0], rows) for x in (batch.tokens, batch.positions, batch.segment_ids)
        )
        return np.asarray(jax.jit(lambda model, *args: model(*args))(model, *inputs).logits_BTV)


@pytest.fixture(scope="module")
def dense_logits() -> np.ndarray:
    """The logits of the dense model itself."""
    config = small_config(model__num_experts=1, router__num_experts_per_token=1)
    with jax.set_mesh(mesh_of()):
        model = jax.jit(cpu_model_maker(config))()
    leaves, structure = jax.tree.flatten_with_path(model)
    model = jax.tree.unflatten(
        structure, [jax.device_put(WEIGHTS[parameter_name(p)], x.sharding) for p, x in leaves]
    )
    return logits_of(model, packed_batch(config))


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({}, {}),
        ({"expert": 4, "fsdp": 2}, {}),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {}),
        (
            {},
            {"router__num_experts_per_token": 3, "router__score": "sigmoid", "router__scale": 2.5},
        ),
        ({}, {"model__granularity": 4, "router__bias": {"update_rate": 0.01}}),
        (
            {"expert": 4, "fsdp": 2},
            {"model__granularity": 4, "router__score": "softmax", "router__scale": 2.0},
        ),
        (
            {"fsdp": 2, "expert": 2, "tensor": 2},
            {"model__granularity": 2, "router__num_experts_per_token": 1},
        ),
    ],
)
def test_copies_compute_at_first_what_the_dense_model_does(sizes, changes, dense_logits):
    model, batch = upcycled(sizes, method="copy", **changes), packed_batch(small_config())
    real = batch.segment_ids[0] > 0
    np.testing.assert_allclose(logits_of(model, batch)[real], dense_logits[real], atol=2e-5, rtol=0)


def test_routers_are_new_and_everything_else_is_copied_to_the_bit():
    found = parameters_of(upcycled({"expert": 4, "fsdp": 2}, method="copy"))
    with jax.set_mesh(mesh_of()):
        fresh = parameters_of(jax.jit(cpu_model_maker(small_config()))())
    for name, numbers in found.items():
        expected = fresh[name] if "router" in name else WEIGHTS[name]
        np.testing.assert_array_equal(
            numbers, np.broadcast_to(expected, numbers.shape), err_msg=name
        )


def test_slices_of_a_dense_layer_are_a_mixture_that_adds_up_to_it():
    rng = np.random.default_rng(0)
    x, router = rms_norm(rng.normal(size=(7, 16)), np.ones(16), 1e-5), rng.normal(size=(16, 3))
    gate, up, down = (rng.normal(size=shape) for shape in ((16, 8), (16, 8), (8, 16)))
    cut = [slice(2 * (e % 4), 2 * (e % 4) + 2) for e in range(12)]  # Three copies of four slices.
    experts = (np.stack([w[:, c] for c in cut]) for w in (gate, up))
    outputs, is_real = np.stack([4 * down[c] for c in cut]), np.ones(7, bool)
    mixed = mixture(x, np.repeat(router, 4, axis=1), *experts, outputs, 8, is_real)
    np.testing.assert_allclose(mixed, swiglu(x, gate, up, down), rtol=1e-9)


def test_any_block_of_the_copies_is_the_slice_that_numpy_takes():
    copies = copy_experts(in_memory(WEIGHTS, DENSE), 12, 4)
    assert copies.keys() == {name for name in WEIGHTS if "router" not in name}
    for name, path in EXPERTS.items():
        axis = 2 if name == "down" else 3
        expected = np.concatenate([np.concatenate(np.split(WEIGHTS[path], 4, axis), 1)] * 3, 1)
        assert copies[path].shape == expected.shape
        for starts in ((0, 0, 0, 0), (1, 3, 2, 5), (0, 7, 1, 1)):
            block = tuple(
                slice(start, size) for start, size in zip(starts, expected.shape, strict=True)
            )
            np.testing.assert_array_equal(copies[path].read(block), expected[block])
        one = (slice(1, 2), slice(5, 6), slice(0, 4), slice(2, 4))
        np.testing.assert_array_equal(copies[path].read(one), expected[one])


def test_noise_is_a_share_of_the_weights_deviation_and_differs_between_experts():
    found = parameters_of(upcycled({}, method="noise", noise_std=0.25))
    for path in EXPERTS.values():
        noise = found[path] - WEIGHTS[path]
        for layer in range(2):
            assert noise[layer].std() == pytest.approx(0.25 * WEIGHTS[path][layer].std(), rel=0.03)
        flat = noise.reshape(16, -1)
        assert np.abs(np.corrcoef(flat) - np.eye(16)).max() < 0.15


def test_the_number_of_redrawn_units_is_exact_and_they_are_the_same_in_all_three_matrices():
    found = parameters_of(upcycled({}, method="drop", drop_fraction=0.4))
    is_new = {}
    for name, path in EXPERTS.items():
        is_changed = found[path] != WEIGHTS[path]
        hidden = 2 if name == "down" else 3
        is_new[name] = is_changed.all(axis=5 - hidden)
        np.testing.assert_array_equal(is_changed.any(axis=5 - hidden), is_new[name])
    assert (is_new["gate"].sum(axis=-1) == int(0.4 * 48)).all()
    np.testing.assert_array_equal(is_new["gate"], is_new["up"])
    np.testing.assert_array_equal(is_new["gate"], is_new["down"])
    # Each expert has other new units.
    assert len({units.tobytes() for units in is_new["gate"].reshape(16, -1)}) == 16


@pytest.mark.parametrize("hidden", [1, 2])
def test_new_units_have_the_mean_and_deviation_of_the_old_ones(hidden):
    key, rng = jax.random.key(3), np.random.default_rng(1)
    weight = rng.normal(2.0, 3.0, size=(3, 10, 10)).astype(np.float32)
    units = np.asarray(choose_units(jax.random.key(4), 3, 10, 0.5))
    with jax.set_mesh(mesh_of()):
        got = np.asarray(redraw(jax.numpy.asarray(weight), np.expand_dims(units, 3 - hidden), key))
        drawn = np.asarray(jax.random.normal(key, weight.shape))
    for e in range(3):
        chosen = (units[e], slice(None)) if hidden == 1 else (slice(None), units[e])
        old, expected = weight[e][chosen], weight[e].copy()
        expected[chosen] = old.mean() + old.std() * drawn[e][chosen]
        np.testing.assert_allclose(got[e], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.meshes
@pytest.mark.parametrize("method", ["noise", "drop"])
def test_random_changes_are_the_same_on_every_mesh(method):
    expected, *others = (
        parameters_of(upcycled(sizes, method=method, model__granularity=2)) for sizes in MESHES
    )
    for other in others:
        for name, numbers in other.items():
            np.testing.assert_allclose(numbers, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_granularity_of_the_model_cuts_the_copies_and_the_planned_base_is_their_whole():
    config = config_of(
        method="drop", model__granularity=4, upcycle__pretrain={"num_steps": 7}, data__path="here"
    )
    assert config.upcycle is not None and config.upcycle.granularity == 4
    dense = plan_dense(config)
    assert (dense.model.num_experts, dense.model.intermediate_size, dense.train.num_steps) == (
        1,
        48,
        7,
    )
    assert (dense.upcycle, dense.data.path, dense.router.num_experts_per_token) == (None, "here", 1)
    assert find_misfits(dense.model, config.model, config.upcycle) == []


def test_a_planned_base_reads_the_text_of_the_run_or_in_tuning_python():
    plan = PretrainConfig()
    assert plan_base(small_config(data__path="here"), plan).data.path == "here"
    assert (
        plan_base(small_config(data__path="chats", finetune__base="x"), plan).data.path
        == "python-stdlib"
    )
    # What is said of conversations means nothing to the base, which reads texts.
    tuning = small_config(finetune={}, data__chat__long_rows="drop", data__text_field="body")
    data = plan_base(tuning, plan).data
    assert (data.chat, data.text_field) == (ChatConfig(), "body")


def test_all_misfits_are_listed_at_once():
    config = config_of(method="copy", granularity=2)
    assert config.upcycle is not None
    other = dataclasses.replace(DENSE, num_experts=4, hidden_size=64, rope_theta=1e4)
    assert find_misfits(other, config.model, config.upcycle) == [
        "its hidden_size is 64, and model.hidden_size=32",
        "its rope_theta is 10000.0, and model.rope_theta=1000000.0",
        "it has 4 experts, and a dense model has 1",
        "its intermediate_size is 48, and model.intermediate_size=48, of which a copy has 2 "
        "(upcycle.granularity, which model.granularity sets)",
    ]


def test_a_base_alone_is_copied():
    upcycle = config_of(base="x").upcycle
    assert upcycle and upcycle.method == "copy"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "clone"}, ["upcycle.method='clone'", "'copy', 'noise', 'drop'"]),
        ({"noise_std": -1}, ["upcycle.noise_std=-1.0"]),
        ({"drop_fraction": 1.5}, ["upcycle.drop_fraction=1.5", "between 0 and 1"]),
        ({"base": ""}, ["upcycle.base"]),
        ({"upcycle__pretrain": {"num_steps": 0}}, ["upcycle.pretrain.num_steps=0", "positive"]),
        (
            {"method": "copy", "granularity": 3},
            ["upcycle.granularity=3", "model.num_experts=8", "num_experts_per_token=2"],
        ),
        ({"granularity": 2}, ["upcycle needs upcycle.base", "upcycle.method"]),
        ({"upcycle__pretrain": {"num_steps": 5}}, ["upcycle needs upcycle.base", "upcycle.method"]),
        (
            {
                "method": "copy",
                "granularity": 2,
                "router__score": "sigmoid",
                "router__renormalize": False,
            },
            ["do not add up", "score=sigmoid"],
        ),
        (
            {
                "method": "copy",
                "granularity": 2,
                "router__choice": "hash",
                "router__z_loss_weight": 0,
                "router__load_balance": {"weight": 0},
            },
            ["needs router.choice=top_k", "router.choice=hash"],
        ),
        (
            {"method": "copy", "model__num_shared_experts": 1},
            ["model.num_shared_experts=1", "set it to 0"],
        ),
        ({"method": "copy", "finetune__base": "x"}, ["finetune and upcycle are two runs"]),
    ],
)
def test_contradictory_settings_are_refused_with_the_reason(changes, words):
    with pytest.raises(ConfigError) as error:
        config_of(**changes)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
