"""The training objective of one micro-batch."""

import dataclasses

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepTotals:
    """Tokens of the whole step, over all micro-batches and devices: what sums are divided by."""

    supervised: jax.Array
    real: jax.Array
    routing: RoutingSums | None = (
        None  # where the load of the whole step is balanced, and not each micro-batch's
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossParts:
    """What micro-batches add up to: each field is this micro-batch's share of the step's value."""

    loss: jax.Array  # cross entropy, nats per supervised token
    total_loss: jax.Array
    load_balance_loss: jax.Array  # before its weight
    sequence_balance_loss: jax.Array  # before its weight
    router_z_loss: jax.Array  # before its weight
    routing: RoutingSums

    def __add__(self, other: "LossParts") -> "LossParts":
        added = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(added, routing=add_sums(self.routing, other.routing))


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Loss of each token in nats, [B, T] float32.

    Compares and sums instead of gathering, so V stays sharded.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.sum(
        jnp.where(is_target_BTV, logits_BTV, 0), axis=-1
    )


def sum_losses(
    output: ModelOutput,
    targets_BT: jax.Array,
    loss_mask_BT: jax.Array,
    totals: StepTotals,
    router: RouterConfig,
) -> LossParts:
    """This micro-batch's share of the step's loss.

    Cross entropy is over the step's supervised tokens. The router's losses are those of this
    micro-batch over all devices, weighted by its share of the step's real tokens: so their weight
    does not shrink with accumulation, and the z-loss is that of one big batch.
    """
    losses_BT = cross_entropy(output.logits_BTV, targets_BT) * loss_mask_BT.astype(jnp.float32)
    loss = jnp.sum(losses_BT) / totals.supervised
    sums = output.routing.sums
    share = sums.tokens[0] / totals.real
    sequence_balance = share * sequence_balance_loss(sums)
    balance = share * load_balance_loss(sums, router.load_balance.normalization, totals.routing)
    if router.load_balance.scope == "sequence":
        balance = sequence_balance
    z_loss = share * router_z_loss(sums)
    total_loss = loss + router.load_balance.weight * balance + router.z_loss_weight * z_loss
    total_loss += router.sequence_loss_weight * sequence_balance
    return LossParts(
        loss, total_loss, balance, sequence_balance, z_loss, jax.lax.stop_gradient(sums)
    )
