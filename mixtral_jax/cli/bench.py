"""Steady-state speed of the train step on this machine, on made-up tokens."""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.bench.generate import describe_generate, measure_generate
from mixtral_jax.bench.layer import describe_layer, measure_layer
from mixtral_jax.cli.flags import make_parser, parse_config
from mixtral_jax.config import Config
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.batch import Batch, batch_spec
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.plan.flops import model_flops_per_step
from mixtral_jax.runs.run import start_devices
from mixtral_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.train.state import init_state
from mixtral_jax.train.step import make_train_step, peak_memory_bytes

WARMUP, MEASURED = 2, 8


def main(arguments: list[str]) -> int:
    """`bench --config=F [--layer | --generate] [--json] [--config.KEY=VALUE ...]`."""
    parser = make_parser(__doc__, "pretrain/tiny.py", "bench")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--layer",
        action="store_true",
        help="one MoE layer beside transformers', not the train step",
    )
    what.add_argument(
        "--generate", action="store_true", help="prefill and decode beside transformers'"
    )
    flags, config = parse_config(parser, arguments)
    config, mesh = start_devices(config, Processes())
    if flags.layer:
        figures, describe = measure_layer(config, mesh), describe_layer
    elif flags.generate:
        figures, describe = measure_generate(config, mesh), describe_generate
    else:
        figures, describe = measure(config, mesh), describe_step
    print(json.dumps(figures) if flags.json else describe(figures))
    return 0


def describe_step(figures: dict[str, Any]) -> str:
    """A line for people."""
    ceiling = f"{figures['ceiling_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    return (
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['step_seconds_median']:.3f} s a "
        "step, "
        f"{figures['utilization']:.0%} of a dense matmul's {ceiling}, "
        f"{(figures['peak_memory_bytes'] or 0) / 2**20:,.0f} MiB a device"
    )


def measure(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compiles the real step, times it, and sets it beside a dense matmul timed in the same minute."""
    ceiling = _ceiling_flops_per_second(config, mesh.devices.flat[0]) * (
        1 if _is_virtual(mesh) else mesh.size
    )
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, config.router.learning_rate_factor)
    tunable = make_tunable(config, mesh.devices.flat[0].platform)
    with jax.set_mesh(mesh):
        state, batch = (
            init_state(tunable.make_model, optimizer, tunable.trainable),
            _made_up_batch(config, mesh),
        )
        model: Any = state.model()
        counts = [count_parameters(model, kind) for kind in (nnx.Param, tunable.trainable)]
        step = (
            make_train_step(optimizer, config.router, schedule, tunable.perturb)
            .lower(state, batch)
            .compile()
        )
        seconds = []
        for _ in range(WARMUP + MEASURED):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    median, flops = statistics.median(seconds[WARMUP:]), model_flops_per_step(config, *counts)
    return {
        "tokens_per_second": config.train.batch_size * config.train.sequence_length / median,
        "step_seconds_median": median,
        "model_flops_per_step": flops,
        "ceiling_flops_per_second": ceiling,
        "utilization": flops / median / ceiling,
        "peak_memory_bytes": peak_memory_bytes(step),
    }


def _made_up_batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    train = config.train
    shape = (train.gradient_accumulation, train.micro_batch_size, train.sequence_length)
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (*shape[:2], shape[2] + 1), dtype=np.int32
    )
    ones, positions = (
        np.ones(shape, np.int32),
        np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape),
    )
    batch = Batch(tokens[..., :-1], tokens[..., 1:], ones, ones, positions)
    return jax.device_put(batch, jax.NamedSharding(mesh, batch_spec(AxisRules())))


def _is_virtual(mesh: jax.sharding.Mesh) -> bool:
    """Virtual CPU devices share the cores that one of them uses whole."""
    return mesh.devices.flat[0].platform == "cpu"


def _ceiling_flops_per_second(config: Config, device: Any) -> float:
    """Speed of a dense matmul of an expert's shape, in the compute dtype, on one device."""
    rows, D, F = 2048, config.model.hidden_size, config.model.intermediate_size
    x, weight = (
        jax.device_put(jnp.ones(shape, config.model.dtype), device) for shape in ((rows, D), (D, F))
    )
    repeats = max(1, int(2e10 / (2 * rows * D * F)))

    @jax.jit
    def multiply(x, weight):
        return jax.lax.fori_loop(0, repeats, lambda _, x: (x @ weight) @ weight.T / F / D, x)

    multiply(x, weight).block_until_ready()
    start = time.perf_counter()
    multiply(x, weight).block_until_ready()
    return 4 * rows * D * F * repeats / (time.perf_counter() - start)
