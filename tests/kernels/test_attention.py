"""Attention a block of queries at a time, and on TPU's kernel, against all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import attention, splash
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


@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "data=2,tensor=2"]
)
def test_blocks_of_queries_give_what_all_at_once_do(monkeypatch, sizes):
    whole = lambda *x: attend(*x, "xla")  # noqa: E731
    arrays = inputs(T=64, H=12)
    expected = value_and_grads(whole, mesh_of(), *arrays)
    monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 16)
    check(value_and_grads(lambda *x: attend(*x, "xla"), mesh_of(**sizes), *arrays), expected)


def test_blocks_of_queries_need_less_memory_than_all_at_once():
    def peak(T, block):
        q, k, v, dy, segments = inputs(B=1, T=T, N=2, K=1, H=8)
        attention.QUERIES_PER_BLOCK, before = block, attention.QUERIES_PER_BLOCK
        try:
            grad = jax.grad(lambda q: jnp.sum(attend(q, k, v, segments, "xla") * dy))
            with jax.set_mesh(mesh_of()):
                return jax.jit(grad).lower(q).compile().memory_analysis().peak_memory_in_bytes
        finally:
            attention.QUERIES_PER_BLOCK = before

    assert peak(2048, 256) < peak(2048, 2048) / 3


@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "data=2,tensor=2"]
)
def test_the_kernel_for_tpu_gives_what_xla_does(sizes):
    arrays = inputs()
    expected = value_and_grads(lambda *x: attend(*x, "xla"), mesh_of(), *arrays)
    scaled = lambda q, *x: splash.attend(q * q.shape[-1] ** -0.5, *x, interpret=True)  # noqa: E731
    check(value_and_grads(scaled, mesh_of(**sizes), *arrays), expected)
