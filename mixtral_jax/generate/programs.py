"""The two programs that run on devices: `prefill` reads prompts, `decode` writes more tokens.

A program is compiled per bucket of sizes, and serves all prompts of that size. Rows that have
ended, and rows that only fill up the batch, are padding for the model: it neither attends to them
nor routes them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from mixtral_jax.generate.cache import Cache
from mixtral_jax.generate.sampler import Sampling, choose_tokens
from mixtral_jax.model.transformer import Transformer

# Stands in `Written.tokens_BC` where a row got no token.
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are chosen.

    Attributes:
        sampling: the sampling settings per row; None is greedy.
        eos_ids: int32 [number of ids], each of which ends a row; there may be none.
        num_choices: ids from this number on are never chosen, because they have no meaning.
        unused_ids: lower ids without a meaning, which are never chosen either.
    """

    sampling: Sampling | None
    eos_ids: jax.Array | np.ndarray
    num_choices: int = dataclasses.field(metadata={"static": True})
    unused_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def goes_on(self, token_B: jax.Array) -> jax.Array:
        """Which rows do not end with this token."""
        return jnp.all(token_B[:, None] != self.eos_ids[None, :], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state between two tokens. The last token is chosen, but not yet in the cache."""

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array  # the position of that token in its row
    is_live_B: jax.Array
    num_chosen: jax.Array  # tokens chosen so far, the same for all live rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """The state after some new tokens, and the tokens [B, C], replicated on all devices."""

    state: State
    tokens_BC: jax.Array


def prefill(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, rule: Rule, *, num_slots: int
) -> Written:
    """Reads prompts, and chooses the first new token of each.

    Prompts are padded on the left. Row b has `lengths_B[b]` tokens; 0 means that it has no prompt.
    """
    T = tokens_BT.shape[1]
    positions_BT = jnp.arange(T)[None] - (T - lengths_B)[:, None]
    segment_ids_BT = (positions_BT >= 0).astype(jnp.int32)
    positions_BT = jnp.maximum(positions_BT, 0)
    output = model.run_blocks(tokens_BT, positions_BT, segment_ids_BT, gives_key_values=True)
    assert output.key_values is not None
    token_B = _choose(model, output.x_BTD, rule, jnp.int32(0))
    cache = Cache.begin(output.key_values, segment_ids_BT, num_slots)
    is_row_B = lengths_B > 0
    state = State(cache, token_B, lengths_B, is_row_B & rule.goes_on(token_B), jnp.int32(1))
    return Written(state, _replicate(jnp.where(is_row_B, token_B, NO_TOKEN)[:, None]))


def decode(
    model: Transformer,
    state: State,
    wanted_B: jax.Array,
    rule: Rule,
    num_tokens: jax.Array,
    *,
    room: int,
) -> Written:
    """Writes up to `num_tokens` more tokens (at most `room`) to each live row in `wanted_B`.

    Ends early if no row is left.
    """
    state = dataclasses.replace(state, is_live_B=state.is_live_B & wanted_B)
    out_sharding = model.rules.spec("batch", None)
    tokens_BC = jnp.full((len(wanted_B), room), NO_TOKEN, jnp.int32, out_sharding=out_sharding)

    def goes_on(carry: Any) -> jax.Array:
        step, state, _ = carry
        return (step < num_tokens) & jnp.any(state.is_live_B)

    def write_token(carry: Any) -> Any:
        step, state, tokens_BC = carry
        written_B, state = _advance(model, state, rule)
        tokens_BC = jax.lax.dynamic_update_slice_in_dim(tokens_BC, written_B[:, None], step, axis=1)
        return step + 1, state, tokens_BC

    _, state, tokens_BC = jax.lax.while_loop(goes_on, write_token, (jnp.int32(0), state, tokens_BC))
    return Written(state, _replicate(tokens_BC))


def _advance(model: Transformer, state: State, rule: Rule) -> tuple[jax.Array, State]:
    segment_ids_B1 = state.is_live_B[:, None].astype(jnp.int32)
    output = model.run_blocks(
        state.token_B[:, None],
        state.position_B[:, None],
        segment_ids_B1,
        state.cache.past,
        gives_key_values=True,
    )
    assert output.key_values is not None
    token_B = _choose(model, output.x_BTD, rule, state.num_chosen)
    cache = state.cache.append(output.key_values, segment_ids_B1)
    is_live_B = state.is_live_B & rule.goes_on(token_B)
    written_B = jnp.where(state.is_live_B, token_B, NO_TOKEN)
    return written_B, State(cache, token_B, state.position_B + 1, is_live_B, state.num_chosen + 1)


def _choose(model: Transformer, x_BTD: jax.Array, rule: Rule, num_chosen: jax.Array) -> jax.Array:
    """The token that follows the last column."""
    logits_BV = model.to_logits(x_BTD[:, -1:])[:, 0]
    return choose_tokens(
        logits_BV,
        rule.sampling,
        num_chosen,
        rule.num_choices,
        model.rules,
        unused_ids=rule.unused_ids,
    )


def _replicate(x_BC: jax.Array) -> jax.Array:
    """Replicates the tokens, so that every process can read them."""
    return jax.reshard(x_BC, P(None, None))
