"""Computes what transformers computes from a Hugging Face folder, with its names and shapes.

The golden test and the live comparison share it. Gradients are renamed here by hand, and not with
the reader's table, which is under test.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import RouterConfig
from mixtral_jax.model.training_mode import enter_training
from mixtral_jax.model.transformer import ModelOutput, Transformer
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.loss import StepTotals, next_token_loss, sum_losses
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import make_train_step
from tests.cases import cpu_model_maker, on_mesh

IGNORED = -100


def load(folder: Path) -> tuple[Transformer, RouterConfig]:
    """Loads the model of a folder onto the current mesh, with the losses it was trained with."""
    weights = open_weights(folder)
    config = weights.architecture.config(batch_size=8)
    return load_model(weights.parameters, jax.eval_shape(cpu_model_maker(config))), config.router


def make_batch(input_ids: np.ndarray, attention_mask: np.ndarray, labels: np.ndarray) -> Batch:
    """One micro-batch on the current mesh, with rows of padding until the mesh size divides it.

    `labels` are those of transformers: not yet shifted, and -100 for tokens without a loss.
    """
    mesh = jax.sharding.get_mesh()
    to_add = -len(input_ids) % mesh.size
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    arrays = (input_ids, np.maximum(targets, 0), targets != IGNORED, attention_mask, positions)
    padded = (np.pad(np.asarray(array, np.int32), ((0, to_add), (0, 0)))[None] for array in arrays)
    return on_mesh(Batch(*padded), mesh)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the losses, and its gradients by the names of transformers."""

    value: float
    gradients: dict[str, np.ndarray]


def outputs_and_losses(
    model: Transformer, batch: Batch, router: RouterConfig
) -> tuple[ModelOutput, dict[str, Part]]:
    """The model's output on the host, and the losses `total`, `ce` and unweighted `aux`."""
    parts, output = {}, None
    for name, share in zip(("total", "ce", "aux"), jnp.eye(3), strict=True):
        (value, output), gradients = _value_and_grad(model, share, batch, router)
        parts[name] = Part(float(value), by_transformers_name(gradients))
    return jax.tree.map(np.asarray, output), parts


@functools.partial(jax.jit, static_argnames="router")
@functools.partial(jax.value_and_grad, has_aux=True)
def _value_and_grad(
    model: Transformer, share_of_loss: jax.Array, batch: Batch, router: RouterConfig
):
    """The sum of the losses by the given shares, which are an argument to compile only once."""
    output = model(batch.tokens[0], batch.positions[0], batch.segment_ids[0])
    totals = StepTotals(
        jnp.sum(batch.loss_mask).astype(jnp.float32), jnp.sum(batch.segment_ids).astype(jnp.float32)
    )
    micro = jax.tree.map(lambda rows: rows[0], batch)
    parts = sum_losses(next_token_loss, output, micro, totals, router)
    return jnp.dot(
        share_of_loss, jnp.stack([parts.total_loss, parts.loss, parts.load_balance_loss])
    ), output


def adamw_trajectory(model: Transformer, batch: Batch, router: RouterConfig) -> list[float]:
    """The total loss before each of five steps of AdamW, which decays every tensor.

    The model's buffers are donated.
    """
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    in_training = functools.partial(enter_training, key=jax.random.key(0))
    step = make_train_step(optimizer, router, lambda _: 1e-3, lambda model, *_: in_training(model))
    state, losses = TrainState.create(model, optimizer), []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["total_loss"]))
    return losses


def by_transformers_name(tree: Transformer) -> dict[str, np.ndarray]:
    """The arrays of a tree shaped like the model, as in `named_parameters` of transformers."""

    def fetch(variable) -> np.ndarray:
        return np.asarray(variable[...])

    def rows_first(w_LDNH: np.ndarray) -> np.ndarray:
        return w_LDNH.reshape(*w_LDNH.shape[:2], -1).swapaxes(1, 2)

    blocks = tree.blocks
    gate, up = blocks.moe.experts.gate.weight, blocks.moe.experts.up.weight
    out_LNHD = fetch(blocks.attention.out.weight)
    stacked = {
        "self_attn.q_proj.weight": rows_first(fetch(blocks.attention.query.weight)),
        "self_attn.k_proj.weight": rows_first(fetch(blocks.attention.key.weight)),
        "self_attn.v_proj.weight": rows_first(fetch(blocks.attention.value.weight)),
        "self_attn.o_proj.weight": out_LNHD.reshape(len(out_LNHD), -1, out_LNHD.shape[-1]).swapaxes(
            1, 2
        ),
        "mlp.gate.weight": fetch(blocks.moe.router.gate.weight).swapaxes(1, 2),
        "mlp.experts.gate_up_proj": np.concatenate([fetch(gate), fetch(up)], axis=3).swapaxes(2, 3),
        "mlp.experts.down_proj": fetch(blocks.moe.experts.down.weight).swapaxes(2, 3),
        "input_layernorm.weight": fetch(blocks.attention_norm.scale),
        "post_attention_layernorm.weight": fetch(blocks.moe_norm.scale),
    }
    named = {
        f"model.layers.{i}.{name}": w for name, w_L in stacked.items() for i, w in enumerate(w_L)
    }
    return named | {
        "model.embed_tokens.weight": fetch(tree.embedding_VD),
        "model.norm.weight": fetch(tree.norm.scale),
        "lm_head.weight": fetch(tree.unembed.weight).T,
    }
