"""Every transport, on every mesh, against loops over experts on one device: values, gradients,
counts and losses.

`make test-meshes` runs a cover of all pairs of the settings below, `make test` each transport of it
on each mesh, `make test-all` their whole product.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from mixtral_jax.config import DispatchConfig, GroupedMatmulName, RouterConfig, TransportName
from mixtral_jax.model.balance import load_balance_loss, router_z_loss
from mixtral_jax.model.dispatch.transports import TRANSPORTS
from mixtral_jax.model.moe import MoE
from tests.cases import RULES, kernels_of, mesh_of, only_masked, relative_norm, small_config
from tests.reference import mixture, room_left
from tests.skew import prefer_experts

B, T, D = 8, 12, 32
MESHES = {
    "expert=8": {"expert": 8},
    "expert=4,fsdp=2": {"expert": 4, "fsdp": 2},
    "expert=2,tensor=2,fsdp=2": {"expert": 2, "tensor": 2, "fsdp": 2},
    "data=2,expert=4": {"data": 2, "expert": 4},
}
EXPERTS = {
    "8 top-2": (8, 2),
    "8 top-1": (8, 1),
    "8 top-3": (8, 3),
    "16 top-2": (16, 2),
    "6 top-2": (6, 2),
}
SETTINGS = {
    "transport": TRANSPORTS,
    "mesh": MESHES,
    "experts": EXPERTS,
    "capacity_factor": (None, 1.25),
    "padding": (False, True),
    "routing": ("random", "skewed", "all to one", "empty expert"),
    "kernel": ("blocks", "ragged_dot"),  # The second, on a TPU the first choice, in chunks.
}


def _is_possible(case):
    return EXPERTS[case["experts"]][0] % MESHES[case["mesh"]]["expert"] == 0


def _pairs(case):
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def _cases():
    """The whole product. Cases outside a greedy cover of all pairs are marked `full`; of those in
    it, all but the first of each transport on each mesh are marked `meshes`.
    """
    product = [
        dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())
    ]
    product = [case for case in product if _is_possible(case)]
    missing = set().union(*map(_pairs, product))
    cover = []
    while missing:
        best = max(product, key=lambda case: len(_pairs(case) & missing))
        cover.append(best)
        missing -= _pairs(best)
    first = {(case["transport"], case["mesh"]): case for case in reversed(cover)}.values()

    def as_param(case):
        in_cover = () if case in first else pytest.mark.meshes
        marks = in_cover if case in cover else pytest.mark.full
        return pytest.param(*case.values(), id=", ".join(map(str, case.values())), marks=marks)

    return [as_param(case) for case in product]


@functools.cache
def make_layer(
    experts,
    transport: TransportName = "all_gather",
    capacity_factor=None,
    buffer_factor=None,
    kernel: GroupedMatmulName = "blocks",
):
    """A function that initialises one MoE layer."""
    num_experts, k = EXPERTS[experts]
    config = small_config(model__num_experts=num_experts).model
    router = RouterConfig(num_experts_per_token=k)
    dispatch = DispatchConfig(capacity_factor=capacity_factor, buffer_factor=buffer_factor)
    kernels = kernels_of(transport, kernel)
    return lambda: MoE(config, router, dispatch, kernels, RULES, nnx.Rngs(0))


def inputs(routing, padding, num_experts):
    """x, whose first feature is 1, what to multiply y by, which tokens are real, and offsets of the
    router's logits.
    """
    rng = np.random.default_rng(7)
    x, cotangent = rng.normal(size=(2, B, T, D)).astype(np.float32)
    x[..., 0] = 1
    is_real = np.ones((B, T), bool)
    if padding:
        is_real[1, 5:], is_real[2], is_real[3, :3] = False, False, False
    offsets = {
        "random": np.zeros(num_experts),
        "skewed": -1.5 * np.arange(num_experts),
        "all to one": 100.0 * (np.arange(num_experts) == 1),
        "empty expert": -100.0 * (np.arange(num_experts) == 3),
    }[routing]
    return x, cotangent, is_real, offsets.astype(np.float32)


@functools.cache
def compiled(mesh_name, experts, *settings):
    """value_and_grad of a sum over y, in the layer and x; also what the router decided."""
    make = make_layer(experts, *settings)

    def loss(layer, x, cotangent, is_real):
        output = layer(x, only_masked(is_real))
        return jnp.sum(output.y_BTD * cotangent), (output.y_BTD, output.routing)

    @jax.jit
    def run(offsets, x, cotangent, is_real):
        layer = make()
        prefer_experts(layer.router.gate.weight, offsets)
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x, cotangent, is_real)

    return run, mesh_of(**MESHES[mesh_name])


def run(mesh_name, experts, settings, x, cotangent, is_real, offsets):
    step, mesh = compiled(mesh_name, experts, *settings)
    rows = jax.NamedSharding(mesh, RULES.spec("batch", None))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        on_mesh = jax.device_put((x, cotangent, is_real), rows)
        return jax.device_get(step(offsets, *on_mesh))


def weights_of(experts, offsets):
    """The parameters of the layer, as the reference takes them."""
    with jax.set_mesh(mesh_of()):
        layer = jax.jit(make_layer(experts))()
        prefer_experts(layer.router.gate.weight, offsets)
    matrices = (layer.experts.gate, layer.experts.up, layer.experts.down)
    return [np.asarray(p.weight[...]) for p in (layer.router.gate, *matrices)]


def moe_by_loop(x, router, gate, up, down, chosen, is_kept):
    """The layer in plain jnp: every expert on every token, times the weight of its route."""
    logits = jnp.take_along_axis(x @ router, chosen, axis=-1)
    weights = jax.nn.softmax(logits) * is_kept
    y = 0
    for e in range(len(gate)):
        of_expert = (jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e]
        y += of_expert * jnp.sum(jnp.where(chosen == e, weights, 0), axis=-1, keepdims=True)
    return y


@jax.jit
@functools.partial(jax.value_and_grad, argnums=range(5), has_aux=True)
def loop_and_gradients(x, router, gate, up, down, chosen, is_kept, cotangent):
    """What `compiled` computes with a layer, with `moe_by_loop`."""
    y = moe_by_loop(x, router, gate, up, down, chosen, is_kept)
    return jnp.sum(y * cotangent), y


def decide(x, router, k, is_real, capacity_factor=None):
    """Experts of each token, best first, and which routes are kept, by sorting in numpy."""
    logits = np.asarray(jnp.asarray(x) @ router)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    is_kept = np.repeat(is_real[..., None], k, axis=-1)
    if capacity_factor:
        weights = np.asarray(jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1)))
        for b, e in itertools.product(range(len(x)), range(router.shape[1])):
            routes = [
                (-weights[b, t, a], t, a)
                for t, a in zip(*np.nonzero((chosen[b] == e) & is_kept[b]), strict=True)
            ]
            limit = math.ceil(capacity_factor * k * is_real[b].sum() / router.shape[1] - 1e-9)
            for _, t, a in sorted(routes)[limit:]:
                is_kept[b, t, a] = False
    return chosen, is_kept


def check_against_loop(got, expected_routes, weights, x, cotangent):
    """Decisions exactly; output and the gradients of x and of every weight to 1e-5 in relative
    norm.
    """
    chosen, is_kept = expected_routes
    (_, (y, routing)), (layer_gradient, x_gradient) = got
    np.testing.assert_array_equal(routing.experts_BTA, chosen)

    with jax.default_matmul_precision("highest"):
        (_, expected), gradients = loop_and_gradients(x, *weights, chosen, is_kept, cotangent)
    experts = layer_gradient.experts
    of_weights = [
        p.weight[...] for p in (layer_gradient.router.gate, experts.gate, experts.up, experts.down)
    ]
    names = ("y", "x", "router", "gate", "up", "down")
    for name, a, b in zip(names, [y, x_gradient, *of_weights], [expected, *gradients], strict=True):
        assert relative_norm(a, b) < 1e-5, name


@pytest.mark.parametrize(list(SETTINGS), _cases())
def test_every_transport_computes_what_loops_over_experts_do(
    transport, mesh, experts, capacity_factor, padding, routing, kernel
):
    num_experts, k = EXPERTS[experts]
    x, cotangent, is_real, offsets = inputs(routing, padding, num_experts)
    weights = weights_of(experts, offsets)
    chosen, is_kept = decide(x, weights[0], k, is_real, capacity_factor)
    got = run(
        mesh, experts, (transport, capacity_factor, None, kernel), x, cotangent, is_real, offsets
    )
    check_against_loop(got, (chosen, is_kept), weights, x, cotangent)
    sums = got[0][1][1].sums
    np.testing.assert_array_equal(got[0][1][1].is_kept_BTA, is_kept)
    load = np.bincount(chosen[is_real].reshape(-1), minlength=num_experts)
    np.testing.assert_array_equal(sums.load_E, load)
    assert (sums.dropped, sums.overflowed, sums.tokens) == (
        is_real.sum() * k - is_kept.sum(),
        0,
        is_real.sum(),
    )
    logits = (x @ weights[0])[is_real].astype(np.float64)
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    stacked = jax.tree.map(lambda s: jnp.asarray(s)[None], sums)
    switch = num_experts * np.sum(load / load.sum() * probability.mean(0))
    assert load_balance_loss(stacked, "switch") == pytest.approx(switch, rel=1e-5)
    assert load_balance_loss(stacked, "hf") == pytest.approx(switch * k, rel=1e-5)
    log_sums = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    assert router_z_loss(stacked) == pytest.approx(np.mean(log_sums**2), rel=1e-5)


@pytest.mark.parametrize(
    ("experts", "mesh", "groups"),
    [
        ("16 top-2", "data=2,expert=4", 2),
        pytest.param("8 top-2", "expert=8", 1, marks=pytest.mark.meshes),
        pytest.param("16 top-2", "expert=8", 1, marks=pytest.mark.meshes),
        pytest.param("8 top-2", "data=2,expert=4", 2, marks=pytest.mark.meshes),
    ],
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_full_buffer_loses_the_last_rows_and_counts_them(transport, experts, mesh, groups):
    num_experts, k = EXPERTS[experts]
    x, cotangent, is_real, offsets = inputs("skewed", False, num_experts)
    weights = weights_of(experts, offsets)
    chosen, _ = decide(x, weights[0], k, is_real)
    places = 8 // groups
    has_room = [
        room_left(c, transport, places, num_experts // places, 1.5)
        for c in np.split(chosen, groups)
    ]
    has_room = np.concatenate(has_room)
    got = run(mesh, experts, (transport, None, 1.5), x, cotangent, is_real, offsets)
    assert got[0][1][1].sums.overflowed == (~has_room).sum() > 0
    check_against_loop(got, (chosen, has_room), weights, x, cotangent)


def test_the_loop_over_experts_is_the_one_in_numpy_and_its_gradients_are_finite_differences():
    x, _, is_real, offsets = inputs("skewed", True, 8)
    weights = weights_of("8 top-2", offsets)
    chosen, is_kept = decide(x, weights[0], 2, is_real, 1.25)
    with jax.default_matmul_precision("highest"):
        y = moe_by_loop(jnp.asarray(x), *weights, chosen, is_kept)
        expected = [
            mixture(*map(np.float64, (x[b], *weights)), 2, is_real[b], 1.25) for b in range(B)
        ]
        assert relative_norm(y, expected) < 1e-5
        small = jnp.asarray(x[:1, :3])
        check_grads(
            lambda *p: moe_by_loop(*p, chosen[:1, :3], is_kept[:1, :3]),
            (small, *weights),
            1,
            ("rev",),
            atol=3e-2,
            rtol=3e-2,
            eps=1e-2,
        )
