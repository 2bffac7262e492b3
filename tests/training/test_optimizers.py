"""AdamW, Adafactor and Muon: each matrix by itself, on any mesh, and kept by checkpoints."""

import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.config import OptimizerConfig, OptimizerName, build
from mixtral_jax.model.layers import Projection
from mixtral_jax.model.moe import ExpertProjection
from mixtral_jax.model.surgery import find_modules
from mixtral_jax.training.assemble import make_training
from mixtral_jax.training.matrices import matrix_of
from mixtral_jax.training.optimizer import OPTIMIZERS, make_optimizer
from tests.cases import keep_some, mesh_of, relative_norm, small_config

NAMES: tuple[OptimizerName, ...] = typing.get_args(OptimizerName)
each_optimizer = pytest.mark.parametrize("name", NAMES)

# Two layers, and more of them than inputs of a matrix: what is stacked is not what is largest.
L, E, D, N, H, F, V = 2, 7, 3, 2, 3, 5, 11
SHAPES: Mapping[str, tuple[int, ...]] = {
    "blocks/attention/query/weight": (L, D, N, H),
    "blocks/attention/out/weight": (L, N, H, D),
    "blocks/moe/experts/gate/weight": (L, E, D, F),
    "blocks/moe/router/gate/weight": (L, D, E),
    "blocks/attention_norm/scale": (L, D),
    "embedding_VD": (V, D),
    "norm/scale": (D,),
}
# As a matrix for each layer, and for each layer and expert.
MATRICES: Mapping[str, tuple[int, ...]] = {
    "blocks/attention/query/weight": (D, N * H),
    "blocks/attention/out/weight": (N * H, D),
    "blocks/moe/experts/gate/weight": (D, F),
    "blocks/moe/router/gate/weight": (D, E),
    "blocks/attention_norm/scale": (D,),
    "embedding_VD": (V, D),
    "norm/scale": (D,),
}
BY_ADAM_IN_MUON = [name for name in SHAPES if "experts" not in name and "attention/" not in name]


def random_tree(seed: int) -> dict[str, Any]:
    """Arrays as a model has them, nested by their names, each layer and expert of its own size."""
    rng, tree = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        *parents, last = name.split("/")
        inner = functools.reduce(lambda part, key: part.setdefault(key, {}), parents, tree)
        sizes = np.exp(rng.normal(size=(*shape[:-2], *(1,) * len(shape[-2:]))))
        inner[last] = jnp.asarray(sizes * rng.normal(size=shape), jnp.float32)
    return tree


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }


def as_matrices(tree: Any) -> dict[str, Any]:
    """The matrices of each stack, over one dimension."""
    return {name: stack.reshape(-1, *MATRICES[name]) for name, stack in flat(tree).items()}


def update_of(optimizer: optax.GradientTransformation, params: Any, gradients: list[Any]) -> Any:
    """The last update, and the state after it."""
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    updates = None
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates, state


def plain(name: OptimizerName, **settings: Any) -> optax.GradientTransformation:
    """The optimizer with a rate of one, without clipping or decay unless the settings say so."""
    defaults = {"name": name, "max_grad_norm": 1e9, "weight_decay": 0.0}
    return make_optimizer(build(OptimizerConfig, defaults | settings), lambda _: 1.0)


def test_every_name_has_an_optimizer() -> None:
    assert tuple(OPTIMIZERS) == NAMES
    assert OptimizerConfig().name == "adamw"


def test_adamw_is_that_of_optax_with_its_numbers_and_its_layout_in_checkpoints() -> None:
    def is_matrix(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path), params)

    config = OptimizerConfig()
    expected = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda _: 1e-3, b1=0.9, b2=0.95, weight_decay=0.1, mask=is_matrix),
        optax.masked(optax.scale(1.0), lambda params: jax.tree.map(lambda _: False, params)),
    )
    gradients = [random_tree(1), random_tree(2)]
    with jax.set_mesh(mesh_of()):
        ours, theirs = (
            update_of(optimizer, random_tree(0), gradients)
            for optimizer in (make_optimizer(config, lambda _: 1e-3), expected)
        )
    for got, wanted in zip(map(flat, ours), map(flat, theirs), strict=True):
        assert got.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def alone(name: OptimizerName, path: str) -> optax.GradientTransformation:
    """What optax has for a single matrix or vector; Muon in it takes vectors to Adam."""
    if name == "adafactor":
        return optax.adafactor(1.0, min_dim_size_to_factor=1, multiply_by_parameter_scale=False)
    if path in BY_ADAM_IN_MUON:
        return optax.adam(1.0, b2=0.95)
    return optax.contrib.muon(1.0, consistent_rms=0.2)


# From the second step on, optax corrects the momentum of Muon in a way of its own.
@pytest.mark.parametrize(("name", "steps"), [("muon", 1), ("adafactor", 2)])
def test_each_matrix_of_a_stack_is_updated_as_optax_updates_it_alone(
    name: OptimizerName, steps: int
) -> None:
    params, gradients = random_tree(0), [random_tree(seed + 1) for seed in range(steps)]
    with jax.set_mesh(mesh_of()):
        got = as_matrices(update_of(plain(name), params, gradients)[0])

    @jax.jit
    def update_each(params: dict[str, Any], gradients: list[dict[str, Any]]) -> dict[str, Any]:
        def update(path: str) -> Any:
            stacks = [gradient[path] for gradient in gradients]
            return jax.vmap(lambda *each: update_of(alone(name, path), each[0], [*each[1:]])[0])(
                params[path], *stacks
            )

        return {path: update(path) for path in params}

    expected = update_each(as_matrices(params), list(map(as_matrices, gradients)))
    for path, updates in got.items():
        for update, wanted in zip(updates, expected[path], strict=True):
            assert relative_norm(update, wanted) < 1e-4, path


@each_optimizer
def test_decay_falls_on_matrices_alone_and_the_routers_factor_on_all_of_its_update(
    name: OptimizerName,
) -> None:
    params = random_tree(0)
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.5), lambda _: 1.0, 0.25)
    with jax.set_mesh(mesh_of()):
        updates, _ = update_of(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    for path, update in flat(updates).items():
        decay = 0.0 if "scale" in path else 0.125 if "router" in path else 0.5
        np.testing.assert_allclose(update, -decay * flat(params)[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_first_moments_are_stored_in_bfloat16(name: OptimizerName) -> None:
    with jax.set_mesh(mesh_of()):
        state = jax.eval_shape(plain(name, first_moment_dtype="bfloat16").init, random_tree(0))
    moments = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree.flatten_with_path(state)[0]
        if leaf.ndim
    ]
    assert len(moments) == len(SHAPES) + (len(SHAPES) if name == "adamw" else len(BY_ADAM_IN_MUON))
    for path, leaf in moments:
        assert leaf.dtype == ("float32" if ".nu" in path else "bfloat16"), path


@each_optimizer
def test_a_checkpoint_restores_the_optimizers_state_bit_for_bit(
    name: OptimizerName, tmp_path: Path
) -> None:
    mesh = mesh_of()
    with jax.set_mesh(mesh), RunCheckpoints(tmp_path / "checkpoints", 1) as checkpoints:
        _, state = update_of(plain(name), random_tree(0), [random_tree(1)])
        checkpoints.save(1, state, {})
        checkpoints.wait()
        everywhere = jax.NamedSharding(mesh, jax.P())
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), state
        )
        restored = checkpoints.restore(1, shapes)
    for path, leaf in flat(state).items():
        np.testing.assert_array_equal(flat(restored)[path], leaf, err_msg=path)


def test_the_matrices_of_parameters_are_those_that_the_model_multiplies_by() -> None:
    config = small_config(
        model__num_shared_experts=1, finetune__lora={"targets": "attention+experts+router"}
    )
    with jax.set_mesh(mesh_of()):
        model = jax.eval_shape(make_training(config, "cpu").make_model)
    modules = find_modules(model, (Projection, ExpertProjection))
    seen = set()
    for path, leaf in jax.tree.flatten_with_path(nnx.state(model, nnx.Param))[0]:
        name = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        matrix = matrix_of(path, leaf.ndim)
        assert matrix.num_stacked + matrix.num_inputs + matrix.num_outputs == leaf.ndim, name
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, Projection):
            _, weight, result = module.equation.replace("->", ",").split(",")
            num_inputs = sum(letter not in result for letter in weight)
            expected = (leaf.ndim - len(weight), num_inputs, len(weight) - num_inputs)
        elif isinstance(module, ExpertProjection):
            expected = (2, 1, 1)
        elif name == "embedding_VD":
            expected = (0, 1, 1)
        else:
            assert name.endswith("scale")
            expected = (leaf.ndim - 1, 1, 0)
        assert (matrix.num_stacked, matrix.num_inputs, matrix.num_outputs) == expected, name
        seen.add(name.removesuffix(".weight"))
    assert modules.keys() <= seen


MESHES = {
    "fsdp=2,expert=2,tensor=2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "expert=4,fsdp=2": {"expert": 4, "fsdp": 2},
    "data=8": {"data": 8},
    "data=2,fsdp=2,tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@functools.cache
def second_update(name: OptimizerName, **sizes: int) -> dict[str, np.ndarray]:
    """The second update of a model's parameters on a mesh, with random gradients."""
    config = small_config(optimizer__name=name, optimizer__learning_rate=1.0)
    training = make_training(config, "cpu")
    with jax.set_mesh(mesh_of(**sizes)), jax.default_matmul_precision("highest"):
        rng = np.random.default_rng(0)
        wanted = training.abstract_state()
        params, *gradients = (
            jax.tree.map(
                lambda leaf: jax.device_put(
                    rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding
                ),
                wanted.trained,
            )
            for _ in range(3)
        )
        updates, state = update_of(training.optimizer, params, gradients)
        for kept, leaf in zip(
            jax.tree.leaves(state), jax.tree.leaves(wanted.opt_state), strict=True
        ):
            assert kept.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        return flat(updates)


CASES = {f"{name} {mesh}": (name, mesh) for name in ("adafactor", "muon") for mesh in MESHES}


@pytest.mark.parametrize(("case"), keep_some(CASES, "muon fsdp=2,expert=2,tensor=2"))
def test_updates_are_the_same_on_every_mesh(case: tuple[OptimizerName, str]) -> None:
    name, mesh = case
    expected = second_update(name)
    for path, update in second_update(name, **MESHES[mesh]).items():
        assert relative_norm(update, expected[path]) < 1e-5, path
