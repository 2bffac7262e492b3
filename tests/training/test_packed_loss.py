"""The loss of packed conversations is the sum of the losses of each alone."""

import dataclasses

import jax
import numpy as np

from mixtral_jax.data.packing import make_row, plan_rows
from mixtral_jax.data.store import TokenStore
from mixtral_jax.training.loss import cross_entropy
from tests.cases import cpu_model_maker, mesh_of, small_config

LENGTH = 32


def make_chats(num_chats, vocab_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, LENGTH // 2, num_chats)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = rng.integers(0, 2, offsets[-1]).astype(np.uint8)
    mask[offsets[1:] - 1] = 1
    return TokenStore(
        rng.integers(0, vocab_size, offsets[-1]).astype(np.uint16), offsets, "chats", mask
    )


def pack(store):
    plan = plan_rows(store, LENGTH, long_documents="error")
    rows = [make_row(store, plan, i) for i in range(plan.num_rows)]
    return {
        field.name: np.stack([getattr(row, field.name) for row in rows])
        for field in dataclasses.fields(rows[0])
    }


def chat_alone(store, number):
    first, end = store.offsets[number : number + 2]
    return pack(
        TokenStore(
            store.tokens[first:end],
            np.array([0, end - first]),
            f"chat {number}",
            store.loss_mask[first:end],
        )
    )


def test_the_loss_of_packed_conversations_is_the_sum_of_their_losses_alone():
    config = small_config(train__sequence_length=LENGTH)
    store = make_chats(11, config.model.vocab_size)
    packed = pack(store)
    alone = [chat_alone(store, number) for number in range(store.num_documents)]
    assert packed["tokens"].shape[0] < len(alone) / 2
    together = {name: np.concatenate([chat[name] for chat in alone]) for name in packed}
    with jax.set_mesh(mesh_of()), jax.default_matmul_precision("highest"):
        model = jax.jit(cpu_model_maker(config))()

        @jax.jit
        def losses_of(tokens, positions, segment_ids, targets, loss_mask):
            return (
                cross_entropy(model(tokens, positions, segment_ids).logits_BTV, targets) * loss_mask
            )

        names = ("tokens", "positions", "segment_ids", "targets", "loss_mask")
        packed_losses, losses_alone = (
            np.asarray(losses_of(*(rows[name] for name in names))) for rows in (packed, together)
        )
    assert packed["loss_mask"].sum() == together["loss_mask"].sum()
    np.testing.assert_allclose(
        np.sort(packed_losses[packed["loss_mask"] == 1]),
        np.sort(losses_alone[together["loss_mask"] == 1]),
        rtol=2e-6,
    )
    np.testing.assert_allclose(
        packed_losses.sum(dtype=np.float64), losses_alone.sum(dtype=np.float64), rtol=1e-7
    )
