"""How choices match tokens and experts: what they see, how even they are, how to add one."""

import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import RouterChoice, RouterConfig
from mixtral_jax.model import selection
from mixtral_jax.model.router import Router
from mixtral_jax.model.selection import SELECTORS, Candidates
from mixtral_jax.model.tokens import Tokens
from tests.cases import RULES, mesh_of, only_masked
from tests.model.routed_layer import (
    EXPERT_CHOICE,
    NO_LOSS,
    SINKHORN,
    B,
    E,
    T,
    best,
    config_of,
    inputs,
    run,
    taken_by,
)


def test_every_choice_that_the_config_names_exists() -> None:
    assert set(SELECTORS) == set(get_args(RouterChoice))


@pytest.mark.parametrize("choice", ["hash", "random"])
def test_blind_choices_take_k_experts_about_equally_often(choice: str) -> None:
    got = run(config_of({"choice": choice, **NO_LOSS}))
    real = np.asarray(inputs()[1].is_real_BT)
    np.testing.assert_array_equal(taken_by(got.routing).sum(axis=-1), np.where(real, 2, 0))
    load = np.asarray(got.routing.sums.load_E)
    assert 0.3 < load.min() / load.mean() < load.max() / 20 < 2.5
    assert not got.gate_gradient.any()


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


@pytest.mark.parametrize("options", [SINKHORN, EXPERT_CHOICE], ids=["sinkhorn", "expert choice"])
def test_choices_that_see_later_tokens_are_plain_top_k_outside_training(
    options: dict[str, Any],
) -> None:
    got = run(config_of(options), is_training=False)
    logits = inputs()[0] @ got.layer.router.gate.weight[...]
    np.testing.assert_array_equal(got.routing.experts_BTA, best(logits, 2))


def test_expert_choice_is_even_whatever_the_router_says() -> None:
    load = run(config_of(EXPERT_CHOICE)).routing.sums.load_E
    np.testing.assert_array_equal(load, load[0])


def test_sinkhorn_is_nearly_even_whatever_the_router_says() -> None:
    offset = np.where(np.arange(E) < 2, 3.0, 0.0)
    logits = np.random.default_rng(0).normal(size=(1, 512, E)) + offset
    tokens, router = only_masked(np.ones((1, 512), np.int32)), config_of(SINKHORN).router
    candidates = Candidates(
        jnp.asarray(logits), jax.nn.softmax(logits), tokens, jnp.uint32(0), is_training=True
    )
    chosen = selection.select_by_sinkhorn(candidates, router).experts_BTA
    load, top_k_load = (
        np.bincount(np.ravel(experts)) * E / (2 * 512) for experts in (chosen, best(logits, 2))
    )
    assert load.max() < 1.15 < 3 < top_k_load.max()


def test_the_choice_of_the_guide_works_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs/routers.md").read_text()
    ((name, function),) = re.findall(r'`"(\w+)": (\w+),`', guide)
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    scope = vars(selection) | {}
    exec(textwrap.dedent(code), scope)
    choices = Literal["top_k", name]
    monkeypatch.setitem(RouterConfig.__annotations__, "choice", choices)
    monkeypatch.setitem(SELECTORS, name, scope[function])
    got = run(config_of({"choice": name}), sizes={"expert": 4, "fsdp": 2})
    logits = inputs()[0] @ got.layer.router.gate.weight[...]
    expected = np.concatenate([best(logits[..., :-1], 1), np.full((B, T, 1), E - 1)], axis=-1)
    np.testing.assert_array_equal(got.routing.experts_BTA, expected)
