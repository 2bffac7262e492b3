"""Attention a block of queries at a time, and on TPU's kernel, against all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import blockwise, splash
from mixtral_jax.kernels.attention import attend
from tests.cases import RULES, mesh_of, relative_norm


def inputs(B=2, T=256, N=4, K=2, H=128):
    """q, k, v, a cotangent, and rows of two documents and padding."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))
    segments = np.ones((B, T), np.int32)
    segments[:1, T // 3 :], segments[1:, T // 2 :] = 2, 0
    return q, k, v, dy, segments


def value_and_grads(function, mesh, q, k, v, dy, segments):
    heads, rows = (
        jax.NamedSharding(mesh, RULES.spec(*axes))
        for axes in (("batch", None, "act_heads", None), ("batch", None))
    )
    real = (segments > 0)[..., None, None]

    def loss(q, k, v, dy, segments):
        y = function(q, k, v, segments)
        return jnp.sum(jnp.where(real, y * dy, 0)), jnp.where(real, y, 0)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        arrays = (
            *(jax.device_put(x, heads) for x in (q, k, v, dy)),
            jax.device_put(segments, rows),
        )
        (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            *arrays
        )
    return [np.asarray(x) for x in (y, *gradients)]


def check(got, expected):
    for name, a, b in zip(("y", "q", "k", "v"), got, expected, strict=True):
        assert relative_norm(a, b) < 1e-5, name


def all_scores_at_once(q, k, v, segments):
    """Attention by its definition."""
    B, T, N, H = q.shape
    by_head = jax.typeof(q).sharding
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2, out_sharding=by_head) for x in (k, v))
    sees = (segments[:, :, None] == segments[:, None]) & jnp.tri(T, dtype=bool)[None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    weights = jax.nn.softmax(jnp.where(sees[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def cut_into(monkeypatch, block_tokens):
    monkeypatch.setattr(blockwise, "MAX_BLOCK_TOKENS", block_tokens)
    return lambda *x: attend(*x, "xla")


@pytest.mark.parametrize("T", [64, 57], ids=["whole blocks", "the last block is cut"])
def test_blocks_give_what_all_scores_at_once_do(monkeypatch, T):
    arrays = inputs(T=T, H=12)
    expected = value_and_grads(all_scores_at_once, mesh_of(), *arrays)
    for block_tokens in (16, 64):
        check(value_and_grads(cut_into(monkeypatch, block_tokens), mesh_of(), *arrays), expected)


def test_blocks_give_the_same_on_a_mesh(monkeypatch):
    arrays, blocks = inputs(T=64, H=12), cut_into(monkeypatch, 16)
    expected = value_and_grads(blocks, mesh_of(), *arrays)
    check(value_and_grads(blocks, mesh_of(data=2, tensor=2), *arrays), expected)


def test_pairs_of_blocks_that_share_no_segment_are_left_out():
    def visits(segments):
        pairs = blockwise._Pairs(jnp.asarray(segments, jnp.int32), T=len(segments[0]), size=2)
        add = lambda pair, seen: seen.at[pair.query // 2, pair.key // 2].add(1)  # noqa: E731
        return np.asarray(pairs.fold(add, jnp.zeros((4, 4), jnp.int32))).tolist()

    whole = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert visits([[1] * 8]) == whole
    assert visits([[1, 1, 1, 2, 2, 2, 0, 0]]) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]
    assert visits([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8]) == whole


def test_memory_grows_with_the_length_of_a_row_and_not_with_its_square(monkeypatch):
    def peak(T):
        q, k, v, dy, segments = inputs(B=1, T=T, N=2, K=1, H=8)
        grad = jax.grad(lambda q: jnp.sum(attend(q, k, v, segments, "xla") * dy))
        with jax.set_mesh(mesh_of()):
            return jax.jit(grad).lower(q).compile().memory_analysis().peak_memory_in_bytes

    monkeypatch.setattr(blockwise, "MAX_BLOCK_TOKENS", 64)
    assert peak(4096) < 2.5 * peak(2048)


@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "data=2,tensor=2"]
)
def test_the_kernel_for_tpu_gives_what_xla_does(sizes):
    arrays = inputs()
    expected = value_and_grads(lambda *x: attend(*x, "xla"), mesh_of(), *arrays)
    scaled = lambda q, *x: splash.attend(q * q.shape[-1] ** -0.5, *x, interpret=True)  # noqa: E731
    check(value_and_grads(scaled, mesh_of(**sizes), *arrays), expected)
