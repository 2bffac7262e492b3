"""Mixtral in numpy, as loops over sequences, tokens and experts: slow, but easy to check by eye."""

import math
from fractions import Fraction
from typing import Any

import numpy as np


def reference_logits(
    model: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
    capacity_factor: float | None = None,
) -> np.ndarray:
    """Logits [B, T, V] of a `Transformer`, in float64."""
    c, k = model.config, model.num_experts_per_token
    get = lambda parameter: np.asarray(parameter[...], np.float64)  # noqa: E731
    x = get(model.embedding_VD)[tokens]
    blocks = model.blocks
    for layer in range(c.num_layers):
        of = lambda parameter, layer=layer: get(parameter)[layer]  # noqa: E731
        h = rms_norm(x, of(blocks.attention_norm.scale), c.norm_eps)
        a = blocks.attention
        weights = [of(p.weight) for p in (a.query, a.key, a.value, a.out)]
        for b in range(len(x)):
            x[b] += attend(h[b], *weights, positions[b], segments[b], c.rope_theta)
        h = rms_norm(x, of(blocks.moe_norm.scale), c.norm_eps)
        gate, experts = of(blocks.moe.router.gate.weight), blocks.moe.experts
        matrices = [of(p.weight) for p in (experts.gate, experts.up, experts.down)]
        for b in range(len(x)):
            x[b] += mixture(h[b], gate, *matrices, k, segments[b] > 0, capacity_factor)
        if shared := blocks.moe.shared_experts:
            x += swiglu(h, *(of(p.weight) for p in (shared.gate, shared.up, shared.down)))
    return rms_norm(x, get(model.norm.scale), c.norm_eps) @ get(model.unembed.weight)


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def attend(x, query, key, value, out, positions, segments, theta):
    """One sequence [T, D], one head and one query at a time."""
    T, (_, N, H), K = len(x), query.shape, key.shape[1]
    result = np.zeros_like(x)
    for n in range(N):
        q = rotate(x @ query[:, n], positions, theta)
        k = rotate(x @ key[:, n // (N // K)], positions, theta)
        v = x @ value[:, n // (N // K)]
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
            if seen:
                score = np.array([q[t] @ k[s] / math.sqrt(H) for s in seen])
                weight = np.exp(score - score.max())
                result[t] += (weight / weight.sum()) @ v[seen] @ out[n]
    return result


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** -(np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=1,
    )


def mixture(x, router, gate, up, down, k, is_real, capacity_factor=None):
    """One sequence [T, D], one token and one expert at a time."""
    E = router.shape[1]
    routes = []
    for t in np.flatnonzero(is_real):
        logits = x[t] @ router
        chosen = np.argsort(-logits, kind="stable")[:k]
        weight = np.exp(logits[chosen] - logits[chosen].max())
        routes += [(e, -w, t) for e, w in zip(chosen, weight / weight.sum(), strict=True)]
    limit = (
        math.ceil(Fraction(str(capacity_factor)) * k * int(is_real.sum()) / E)
        if capacity_factor
        else len(routes)
    )
    result = np.zeros_like(x)
    for e in range(E):
        for _, minus_weight, t in sorted(route for route in routes if route[0] == e)[:limit]:
            result[t] -= minus_weight * swiglu(x[t], gate[e], up[e], down[e])
    return result


def swiglu(x, gate, up, down):
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


def room_left(chosen, transport, places, num_local, factor):
    """Which routes of one expert group find room, by the rule that the transport states, walking
    over rows.
    """
    (rows, tokens, k), has_room = chosen.shape, np.zeros(chosen.shape, bool)
    balanced = rows // places * tokens * k
    for place in range(places):
        local = [
            (chosen[b, t, a], b, t, a)
            for b, t, a in np.ndindex(chosen.shape)
            if chosen[b, t, a] // num_local == place
        ]
        if transport == "all_to_all":
            per_sender = rows // places
            senders = [[r for r in local if r[1] // per_sender == s] for s in range(places)]
            taken = [
                r for sent in senders for r in sorted(sent)[: math.ceil(factor * balanced / places)]
            ]
        else:
            taken = sorted(local)[: math.ceil(factor * balanced)]
        for _, b, t, a in taken:
            has_room[b, t, a] = True
    return has_room
