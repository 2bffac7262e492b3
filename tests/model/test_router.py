"""Every option of the router against its formula in numpy, on one device and on a mesh."""

import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import CHOICES, Config, ConfigError, NoiseConfig
from mixtral_jax.model import choices
from mixtral_jax.model.choices import SINKHORN_ROUNDS, Candidates
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.noise import add_noise, jitter
from mixtral_jax.model.router import Router
from mixtral_jax.model.tokens import Tokens
from tests.cases import RULES, mesh_of, only_masked, relative_norm, small_config

B, T, D, E = 8, 12, 32, 8
NO_LOSS = {"load_balance__weight": 0, "z_loss_weight": 0}
SINKHORN = {"choice": "sinkhorn", "load_balance__weight": 0}
EXPERT_CHOICE = {
    "choice": "expert_choice",
    "score": "softmax",
    "renormalize": False,
    "load_balance__weight": 0,
}
GROUPS = {"choice": "group_limited", "score": "sigmoid", "num_groups": 4, "groups_per_token": 2}
BIAS = {"bias__update_rate": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax of the chosen": {},
    "top-1": {"num_experts_per_token": 1},
    "top-3": {"num_experts_per_token": 3},
    "softmax, renormalised": {"score": "softmax"},
    "softmax": {"score": "softmax", "renormalize": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, scaled": {"score": "sigmoid", "renormalize": False, "scale": 2.5},
    "bias": BIAS,
    "sigmoid and bias": {"score": "sigmoid", **BIAS},
    "groups": GROUPS,
    "groups and bias": {**GROUPS, **BIAS},
    "groups of one": {**GROUPS, "num_groups": 8},
    "best two of groups": {**GROUPS, "num_groups": 2, "groups_per_token": 1},
    "sinkhorn": SINKHORN,
    "expert choice": EXPERT_CHOICE,
    "hash": {"choice": "hash", **NO_LOSS},
    "random": {"choice": "random", **NO_LOSS},
    "uniform": {"choice": "uniform", **NO_LOSS},
    "dense": {"choice": "dense", "num_experts_per_token": 8, **NO_LOSS},
}


def config_of(options: dict[str, Any], **others: Any) -> Config:
    dispatch = {"dispatch__transport": "all_gather", "dispatch__grouped_matmul": "blocks"}
    return small_config(
        **{f"router__{name}": value for name, value in options.items()}, **dispatch, **others
    )


def inputs() -> tuple[np.ndarray, Tokens]:
    """Activations, and tokens of which some are padding."""
    rng = np.random.default_rng(3)
    segments = np.ones((B, T), np.int32)
    segments[1, 5:], segments[2], segments[3, :3], segments[4, 6:] = 0, 0, 0, 2
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ids = rng.integers(0, 96, (B, T), dtype=np.int32)
    return rng.normal(size=(B, T, D)).astype(np.float32), Tokens(ids, positions, segments)


def make_layer(config: Config, bias: np.ndarray, *, is_training: bool) -> MoE:
    layer = MoE(config.model, config.router, config.dispatch, RULES, nnx.Rngs(0))
    if layer.router.bias is not None:
        layer.router.bias[...] = jnp.asarray(bias)
    layer.router.training_key = jax.random.key(5) if is_training else None
    return layer


def run(
    config: Config, bias: np.ndarray, sizes: dict[str, int], *, is_training: bool = True
) -> Any:
    """Output, routing and gradients of x and of the router, of one layer on a mesh."""
    x, tokens = inputs()
    mesh = mesh_of(**sizes)
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(gate, x, tokens, cotangent):
        layer = make_layer(config, bias, is_training=is_training)
        layer.router.gate.weight[...] = gate
        y, routing = layer(x, tokens)
        return jnp.sum(y * cotangent), (y, routing)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        x, tokens, cotangent = jax.device_put(
            (x, tokens, cotangent), jax.NamedSharding(mesh, RULES.spec("batch"))
        )
        layer = jax.jit(lambda: make_layer(config, bias, is_training=is_training))()
        gate = layer.router.gate.weight[...]
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, routing)), gradients = jax.device_get(step(gate, x, tokens, cotangent))
        return jax.device_get(layer), y, routing, gradients


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def best(values: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


def hashed(expert: int, *numbers: int) -> float:
    """MurmurHash3's final mix of each number, salted with what came before."""
    mixed = expert
    for number in numbers:
        mixed = (mixed * 0x9E3779B9 + number) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        mixed ^= mixed >> 16
    return (mixed >> 8) / 2**24


def choose(
    config: Config, logits: np.ndarray, scores: np.ndarray, bias: np.ndarray, tokens: Tokens
) -> np.ndarray:
    """Which experts each token takes, bool [B, T, E], by the formula of the choice."""
    router, real = config.router, np.asarray(tokens.segment_ids_BT) > 0
    k, taken = router.num_experts_per_token, np.zeros((B, T, E), bool)
    salt = int(
        jax.random.bits(jax.random.key(5), dtype=jnp.uint32)
    )  # Of the training key of `make_layer`.
    for b, t in itertools.product(range(B), range(T)):
        value = scores[b, t] + bias
        numbers = [int(of_tokens[b, t]) for of_tokens in (tokens.ids_BT, tokens.positions_BT)]
        if router.choice in ("hash", "random"):
            salted = numbers[:1] if router.choice == "hash" else [*numbers, salt]
            taken[b, t, best(np.array([hashed(e, *salted) for e in range(E)]), k)] = True
        if router.choice == "group_limited":
            groups = value.reshape(router.num_groups, -1)
            num_best = max(1, k // router.groups_per_token)
            worth = np.sort(groups, axis=1)[:, -num_best:].sum(axis=1)
            closed = np.setdiff1d(
                np.arange(router.num_groups), best(worth, router.groups_per_token)
            )
            groups[closed] = -np.inf
        if router.choice == "uniform":
            taken[b, t, (k * t + np.arange(k)) % E] = True
        elif router.choice == "dense":
            taken[b, t] = True
        elif router.choice in ("top_k", "group_limited"):
            taken[b, t, best(value, k)] = True
    for b in range(B):
        n = int(real[b].sum())
        if router.choice == "expert_choice":
            for e in range(E):
                tokens_of_e = best(
                    np.where(real[b], scores[b, :, e], -1), -(-k * n // E) if n else 0
                )
                taken[b, tokens_of_e, e] = True
        if router.choice == "sinkhorn":
            plan = np.exp(logits[b])
            for _ in range(SINKHORN_ROUNDS if n else 0):
                plan /= plan.sum(axis=1, keepdims=True)
                plan *= n / E / plan[real[b]].sum(axis=0)
            taken[b, np.arange(T)[:, None], best(plan, k)] = True
    return taken & real[..., None]


def weigh(config: Config, logits: jax.Array, scores: jax.Array, taken: np.ndarray) -> jax.Array:
    """Weights [B, T, E], 0 for experts that are not taken."""
    router = config.router
    if router.choice in ("hash", "random", "uniform", "dense"):
        return taken / router.num_experts_per_token
    values = jnp.exp(logits) if router.score == "softmax_chosen" else scores
    values = jnp.where(taken, values, 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    return router.scale * (
        values / jnp.where(total > 0, total, 1) if router.renormalize else values
    )


def scores_of(config: Config, logits: Any) -> Any:
    return (
        1 / (1 + jnp.exp(-logits)) if config.router.score == "sigmoid" else jax.nn.softmax(logits)
    )


def taken_by(routing: Any) -> np.ndarray:
    is_route = (routing.experts_BTA[..., None] == np.arange(E)) & routing.is_kept_BTA[..., None]
    assert is_route.sum(axis=2).max() <= 1  # No expert twice.
    return is_route.any(axis=2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_is_its_formula_on_a_mesh(options: dict[str, Any]) -> None:
    """Choice, weights, output, sums and gradients, on (expert=4, fsdp=2) in training."""
    config = config_of(options)
    bias = np.where(np.arange(E) % 3 == 0, 0.2, -0.1).astype(np.float32) * bool(
        config.router.bias.update_rate
    )
    layer, y, routing, (gate_gradient, x_gradient) = run(config, bias, {"expert": 4, "fsdp": 2})
    x, tokens = inputs()
    gate = layer.router.gate.weight[...]
    logits = x @ gate
    np.testing.assert_allclose(routing.logits_BTE, logits, atol=1e-5)
    taken = taken_by(routing)
    expected_choice = choose(config, logits, np.asarray(scores_of(config, logits)), bias, tokens)
    np.testing.assert_array_equal(taken, expected_choice)

    def loss(gate, x):
        logits = x @ gate
        weights = weigh(config, logits, scores_of(config, logits), taken)
        matrices = (layer.experts.gate, layer.experts.up, layer.experts.down)
        gate_up, up, down = (projection.weight[...] for projection in matrices)
        each = jnp.einsum(
            "BTEF,EFD->BTED",
            jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, gate_up))
            * jnp.einsum("BTD,EDF->BTEF", x, up),
            down,
        )
        y = jnp.sum(each * weights[..., None], axis=2)
        return jnp.sum(y * np.random.default_rng(1).normal(size=x.shape).astype(np.float32)), y

    with jax.default_matmul_precision("highest"):
        (_, expected), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            gate, jnp.asarray(x)
        )
    assert relative_norm(y, expected) < 1e-5
    np.testing.assert_allclose(
        gate_gradient, gradients[0], atol=1e-5 * np.linalg.norm(gradients[1])
    )
    assert relative_norm(x_gradient, gradients[1]) < 1e-5
    sums, real = routing.sums, np.asarray(tokens.is_real_BT)
    np.testing.assert_array_equal(sums.load_E, taken.sum(axis=(0, 1)))
    scores = np.asarray(scores_of(config, logits))
    probability = scores / scores.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(sums.probability_E, probability[real].sum(axis=0), rtol=1e-5)
    load_B, probability_B = taken.sum(axis=1), np.where(real[..., None], probability, 0).sum(axis=1)
    share_B = load_B / np.maximum(load_B.sum(axis=1, keepdims=True), 1)
    assert sums.sequence_balance == pytest.approx((E * share_B * probability_B).sum(), rel=1e-5)


@pytest.mark.parametrize("choice", ["hash", "random"])
def test_blind_choices_take_k_experts_about_equally_often(choice: str) -> None:
    _, _, routing, (gate_gradient, _) = run(
        config_of({"choice": choice, **NO_LOSS}), np.zeros(E), {}
    )
    real = np.asarray(inputs()[1].is_real_BT)
    np.testing.assert_array_equal(taken_by(routing).sum(axis=-1), np.where(real, 2, 0))
    assert (
        0.3
        < routing.sums.load_E.min() / routing.sums.load_E.mean()
        < routing.sums.load_E.max() / 20
        < 2.5
    )
    assert not gate_gradient.any()


def test_hash_knows_the_id_alone_and_random_the_step_too() -> None:
    def route(choice: str, ids: np.ndarray, seed: int | None) -> np.ndarray:
        config = config_of({"choice": choice, **NO_LOSS})
        x, tokens = inputs()

        @jax.jit
        def run_router(tokens: Tokens) -> jax.Array:
            router = Router(config.model, config.router, config.dispatch, RULES, nnx.Rngs(0))
            router.training_key = None if seed is None else jax.random.key(seed)
            return router(jnp.asarray(x), tokens).experts_BTA

        with jax.set_mesh(mesh_of()):
            return np.asarray(run_router(Tokens(ids, tokens.positions_BT, tokens.segment_ids_BT)))

    ids, sevens = inputs()[1].ids_BT, np.full((B, T), 7)
    np.testing.assert_array_equal(route("hash", ids, 1), route("hash", ids, None))
    of_seven = route("hash", sevens, 1)
    assert (of_seven == of_seven[:1, :1]).all()
    assert np.mean(route("random", ids, 1) != route("random", ids, 2)) > 0.5
    np.testing.assert_array_equal(route("random", ids, None), route("random", ids, None))


def test_choices_that_see_later_tokens_are_plain_top_k_outside_training() -> None:
    for options in (SINKHORN, EXPERT_CHOICE):
        config = config_of(options)
        layer, _, routing, _ = run(config, np.zeros(E), {}, is_training=False)
        logits = inputs()[0] @ layer.router.gate.weight[...]
        np.testing.assert_array_equal(routing.experts_BTA, best(logits, 2))


def test_expert_choice_is_even_whatever_the_router_says() -> None:
    _, _, routing, _ = run(config_of(EXPERT_CHOICE), np.zeros(E), {})
    np.testing.assert_array_equal(routing.sums.load_E, routing.sums.load_E[0])


def test_sinkhorn_is_nearly_even_whatever_the_router_says() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 512, E)) + np.where(
        np.arange(E) < 2, 3.0, 0.0
    )
    tokens, router = only_masked(np.ones((1, 512), np.int32)), config_of(SINKHORN).router
    candidates = Candidates(
        jnp.asarray(logits), jax.nn.softmax(logits), tokens, jnp.uint32(0), is_training=True
    )
    chosen = choices.choose_by_sinkhorn(candidates, router).experts_BTA
    load, of_top_k = (
        np.bincount(np.ravel(experts)) * E / (2 * 512) for experts in (chosen, best(logits, 2))
    )
    assert load.max() < 1.15 < 3 < of_top_k.max()


def test_softmax_over_the_chosen_is_the_softmax_of_all_renormalised() -> None:
    (_, one, _, _), (_, other, _, _) = (
        run(config_of(o), np.zeros(E), {}) for o in ({}, {"score": "softmax"})
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


NOISE = {
    "jitter": {"noise__jitter": 0.1},
    "noisy": {"noise__noisy_top_k": 4.0},
    "gumbel": {"noise__gumbel": 1.0},
}


@pytest.mark.parametrize("options", NOISE.values(), ids=NOISE)
def test_noise_is_there_in_training_alone_and_the_same_on_a_mesh(options: dict[str, Any]) -> None:
    config, zeros = config_of(options), np.zeros(E)
    _, plain, routing, _ = run(config_of({}), zeros, {})
    _, calm, _, _ = run(config, zeros, {}, is_training=False)
    np.testing.assert_array_equal(calm, plain)
    _, alone, noisy, _ = run(config, zeros, {})
    _, spread, _, _ = run(config, zeros, {"expert": 4, "fsdp": 2})
    assert relative_norm(alone, plain) > 1e-2
    assert relative_norm(spread, alone) < 1e-5
    is_on_logits = (
        "noise__jitter" not in options
    )  # That of the input shows in the logits; these are kept without.
    assert np.array_equal(noisy.logits_BTE, routing.logits_BTE) == is_on_logits


def test_noise_has_the_spread_that_it_says() -> None:
    key, shape = jax.random.key(0), (8, 500, 8)
    with jax.set_mesh(mesh_of()):
        rows = RULES.spec("batch", None, None)
        zeros = jnp.zeros(shape)
        normal = np.asarray(add_noise(zeros, NoiseConfig(noisy_top_k=2.0), key, rows))
        gumbel = np.asarray(add_noise(zeros, NoiseConfig(gumbel=0.5), key, rows))
        factor = np.asarray(jitter(zeros + 1, NoiseConfig(jitter=0.2), key, rows))
    assert normal.std() == pytest.approx(2.0 / 8, rel=0.03) and abs(normal.mean()) < 0.01
    assert gumbel.mean() == pytest.approx(0.5 * 0.5772, rel=0.03)
    assert gumbel.std() == pytest.approx(0.5 * np.pi / np.sqrt(6), rel=0.03)
    assert 0.8 <= factor.min() < 0.81 and 1.19 < factor.max() <= 1.2


def test_capacity_of_training_and_of_evaluation_differ_and_drop_as_asked() -> None:
    factors = {"dispatch__capacity_factor": 0.5, "dispatch__eval_capacity_factor": 1.0}
    for is_training, factor in ((True, 0.5), (False, 1.0)):
        _, _, routing, _ = run(config_of({}, **factors), np.zeros(E), {}, is_training=is_training)
        num_tokens = np.asarray(inputs()[1].is_real_BT).sum(axis=1)
        kept = taken_by(routing).sum(axis=1)
        limit = np.ceil(factor * 2 * num_tokens / E)
        assert (kept <= limit[:, None]).all() and (kept == limit[:, None]).any()
    _, _, routing, _ = run(config_of({}, **factors, dispatch__drop="position"), np.zeros(E), {})
    chosen = (routing.experts_BTA[0][..., None] == np.arange(E)).any(
        axis=1
    )  # Of a sequence without padding.
    expected = chosen & (np.cumsum(chosen, axis=0) <= np.ceil(0.5 * 2 * T / E))
    np.testing.assert_array_equal(taken_by(routing)[0], expected)


def test_the_router_computes_and_begins_as_asked() -> None:
    plain, scaled = (
        run(config_of(o), np.zeros(E), {})[0].router.gate.weight[...]
        for o in ({}, {"init_scale": 0.1})
    )
    np.testing.assert_allclose(scaled, 0.1 * plain, rtol=1e-5)
    (_, _, exact, _), (_, _, coarse, _) = (
        run(config_of(o), np.zeros(E), {}) for o in ({}, {"dtype": "bfloat16"})
    )
    assert 1e-4 < relative_norm(coarse.logits_BTE, exact.logits_BTE) < 2e-2


@pytest.mark.parametrize(
    ("options", "others", "words"),
    [
        ({"choice": "top-k"}, {}, ["router.choice='top-k'", "'top_k'", "'expert_choice'"]),
        ({"renormalize": False}, {}, ["changes nothing", "score=softmax"]),
        ({"choice": "expert_choice"}, {}, ["no sum to divide by", "renormalize=False"]),
        ({**EXPERT_CHOICE, "load_balance__weight": 0.01}, {}, ["evens the load by itself", "to 0"]),
        ({"choice": "sinkhorn"}, {}, ["evens the load by itself", "router.load_balance.weight"]),
        (
            {**SINKHORN, "sequence_loss_weight": 0.1},
            {},
            ["evens the load by itself", "router.sequence_loss_weight"],
        ),
        ({**EXPERT_CHOICE, **BIAS}, {}, ["router.bias"]),
        (EXPERT_CHOICE, {"dispatch__capacity_factor": 1.0}, ["how much each expert gets", "None"]),
        (
            {"choice": "dense", **NO_LOSS, "num_experts_per_token": 8},
            {"dispatch__eval_capacity_factor": 4.0},
            ["to None"],
        ),
        ({"choice": "hash", **NO_LOSS, "score": "sigmoid"}, {}, ["weighs all experts alike"]),
        ({"load_balance__scope": "global", "load_balance__weight": 0}, {}, ["use micro"]),
        (
            {"load_balance__scope": "sequence", "sequence_loss_weight": 0.1},
            {},
            ["add the weights up"],
        ),
        ({"init_scale": 0}, {}, ["must be positive"]),
        (BIAS, {"finetune": {}}, ["router.bias.update_rate"]),
        (
            {"choice": "hash"},
            {},
            ["router.load_balance.weight=0.01", "router.z_loss_weight=0.001", "to 0"],
        ),
        ({"choice": "hash", **NO_LOSS, "noise__gumbel": 1}, {}, ["router.noise.gumbel=1.0"]),
        ({"choice": "dense", **NO_LOSS}, {}, ["set model.num_experts=2"]),
        ({"num_groups": 4}, {}, ["group_limited"]),
        ({"choice": "group_limited"}, {}, ["router.num_groups=1"]),
        ({**GROUPS, "num_groups": 3}, {}, ["must divide model.num_experts=8"]),
        ({**GROUPS, "groups_per_token": 5}, {}, ["under router.num_groups=4"]),
        ({**GROUPS, "groups_per_token": 1, "num_experts_per_token": 3}, {}, ["at least 3 experts"]),
        ({"bias__is_zero_mean": True}, {}, ["router.bias.update_rate"]),
        (
            {"load_balance__scope": "sequence", "load_balance__normalization": "hf"},
            {},
            ["pools all tokens"],
        ),
        ({}, {"dispatch__drop": "position"}, ["set dispatch.capacity_factor"]),
        ({"noise__jitter": 1}, {}, ["[0, 1)"]),
    ],
)
def test_senseless_settings_are_refused_with_the_reason(
    options: dict, others: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(options, **others)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_choice_of_the_guide_works_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs/routers.md").read_text()
    ((name, function),) = re.findall(r'`"(\w+)": "(\w+)",`', guide)
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(code), vars(choices) | {"jnp": jnp}, scope)
    monkeypatch.setattr(choices, function, scope[function], raising=False)
    monkeypatch.setitem(CHOICES, name, function)
    layer, _, routing, _ = run(config_of({"choice": name}), np.zeros(E), {"expert": 4, "fsdp": 2})
    logits = inputs()[0] @ layer.router.gate.weight[...]
    expected = np.concatenate([best(logits[..., :-1], 1), np.full((B, T, 1), E - 1)], axis=-1)
    np.testing.assert_array_equal(routing.experts_BTA, expected)
