"""The training objective of one micro-batch: the loss of the task, and the losses of the router.

The loss of the task is an argument of training (`Loss`): next-token prediction by default.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixtral_jax.config import RouterConfig
from mixtral_jax.model.balance import (
    RoutingSums,
    add_sums,
    load_balance_loss,
    router_z_loss,
    sequence_balance_loss,
)
from mixtral_jax.model.transformer import ModelOutput
from mixtral_jax.parallel.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepTotals:
    """Counts over all micro-batches and devices of a step, which losses divide by.

    `routing` is there only if the load of the whole step is balanced
    (`router.load_balance.scope=global`): the sums over the whole step.
    """

    supervised: jax.Array
    real: jax.Array
    routing: RoutingSums | None = None


# (output of the model, micro-batch with arrays [B, T], totals of the step) -> this micro-batch's
# share of the step's loss, a scalar. Shares of micro-batches are added up.
Loss = Callable[[ModelOutput, Batch, StepTotals], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossParts:
    """One micro-batch's share of each loss of the step; shares are added over micro-batches.

    `load_balance_loss`, `sequence_balance_loss` and `router_z_loss` are before their weights.
    """

    loss: jax.Array
    total_loss: jax.Array
    load_balance_loss: jax.Array
    sequence_balance_loss: jax.Array
    router_z_loss: jax.Array
    routing: RoutingSums

    def __add__(self, other: "LossParts") -> "LossParts":
        added = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(added, routing=add_sums(self.routing, other.routing))


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Loss of each token in nats, [B, T] float32.

    Compares and sums instead of gathering, so that V can stay sharded.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]
    log_partition_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_partition_BT - jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)


def next_token_loss(output: ModelOutput, batch: Batch, totals: StepTotals) -> jax.Array:
    """Cross entropy of the next token, in nats per supervised token of the step."""
    losses_BT = cross_entropy(output.logits_BTV, jnp.asarray(batch.targets))
    is_supervised_BT = jnp.asarray(batch.loss_mask).astype(jnp.float32)
    return jnp.sum(losses_BT * is_supervised_BT) / totals.supervised


@jax.named_scope("loss")
def sum_losses(
    loss: Loss, output: ModelOutput, batch: Batch, totals: StepTotals, router: RouterConfig
) -> LossParts:
    """This micro-batch's share of all losses of the step.

    The router's losses are computed over this micro-batch on all devices, and weighted by its
    share of the step's real tokens. So their weight does not shrink under gradient accumulation,
    and the z-loss is that of one big batch.
    """
    task_loss = loss(output, batch, totals)
    sums = output.routing.sums
    share = sums.tokens[0] / totals.real
    sequence_balance = share * sequence_balance_loss(sums)
    balance = share * load_balance_loss(sums, router.load_balance.normalization, totals.routing)
    if router.load_balance.scope == "sequence":
        balance = sequence_balance
    z_loss = share * router_z_loss(sums)
    total = task_loss + router.load_balance.weight * balance + router.z_loss_weight * z_loss
    total += router.sequence_loss_weight * sequence_balance
    return LossParts(
        loss=task_loss,
        total_loss=total,
        load_balance_loss=balance,
        sequence_balance_loss=sequence_balance,
        router_z_loss=z_loss,
        routing=jax.lax.stop_gradient(sums),
    )
