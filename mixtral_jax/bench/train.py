"""Times the whole train step in turn with that of transformers.

Both start from the same weights, train on the same batch with AdamW and clipping, and run in the
same minutes.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.bench.alternate import alternate
from mixtral_jax.bench.peer import import_peer, make_peer, require_one_device
from mixtral_jax.bench.step import (
    count_flops,
    make_own_training,
    make_up_batch,
    measure_ceiling,
)
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import Config, require
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.assemble import Training

ROUNDS = 6
# Trains one step and returns the loss of the next token before it.
Train = Callable[[], float]


def describe_train(figures: dict[str, Any]) -> str:
    """The figures in a line for people."""
    return (
        f"train step: {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['utilization']:.0%} of a dense matmul's "
        f"{figures['ceiling_flops_per_second'] / 1e9:,.0f} GFLOP/s; transformers "
        f"{figures['transformers_tokens_per_second']:,.0f} tokens/s; "
        f"{figures['times_as_fast']:.2f} times as fast"
    )


def measure_train(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Measures the tokens per second of both programs, as medians over runs that alternate.

    Raises:
        ConfigError: torch and transformers are not installed, or more than one device or another
            optimizer was asked for.
    """
    require_one_device(mesh, "--train")
    require(
        config.optimizer.name == "adamw" and config.optimizer.first_moment_dtype != "bfloat16",
        f"optimizer.name={config.optimizer.name} and optimizer.first_moment_dtype="
        f"{config.optimizer.first_moment_dtype}: bench --train compares AdamW with that of torch, "
        "whose moments are float32; leave out both",
    )
    torch, transformers = import_peer("--train")
    torch.manual_seed(0)
    theirs = make_peer(
        config,
        transformers,
        output_router_logits=True,  # Without it there is no balance loss.
        router_aux_loss_coef=config.router.load_balance.weight,
    ).train()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        training = make_own_training(config, mesh)
        batch = _make_batch(config, mesh)
        flops = count_flops(training, jax.eval_shape(training.make_model))
        programs = {
            "ours": _train_ours(training, batch, Path(folder)),
            "transformers": _train_theirs(config, theirs, batch, torch),
        }
        runs = alternate(programs, ROUNDS, _require_same_loss)
        ceiling = measure_ceiling(config, mesh.devices.flat[0])
    mine, other = (program.median_seconds for program in runs.values())
    num_tokens = config.train.batch_size * config.train.sequence_length
    return {
        "tokens_per_second": num_tokens / mine,
        "transformers_tokens_per_second": num_tokens / other,
        "times_as_fast": other / mine,
        "ceiling_flops_per_second": ceiling,
        "utilization": flops / mine / ceiling,
    }


def _require_same_loss(mine: float, other: float) -> None:
    assert abs(mine - other) < 1e-4 * other, (
        f"the losses of the first step are {mine} and {other}: they do not do the same work"
    )


def _make_batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Random tokens. As in transformers, the last token of a row has no target."""
    batch = make_up_batch(config, mesh)
    has_target = jnp.arange(config.train.sequence_length) < config.train.sequence_length - 1
    return dataclasses.replace(batch, loss_mask=batch.loss_mask * has_target[None, None])


def _train_ours(training: Training, batch: Batch, folder: Path) -> Train:
    """Trains a model that starts from the weights in a folder of transformers."""
    weights = open_weights(folder).parameters
    state = training.init(load_model(weights, jax.eval_shape(training.make_base)))
    step = training.train_step.lower(state, batch).compile()

    def train() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        return float(metrics["loss"])

    return train


def _train_theirs(config: Config, model: Any, batch: Batch, torch: Any) -> Train:
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    ids = torch.tensor(np.asarray(batch.tokens[0]), dtype=torch.long)

    def train() -> float:
        optimizer.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        return (output.loss - model.router_aux_loss_coef * output.aux_loss).item()

    return train
