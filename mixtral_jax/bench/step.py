"""Steady-state speed of the real train step, on made-up tokens."""

import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.bench.parts import measure_parts
from mixtral_jax.config import Config
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.batch import Batch, batch_spec
from mixtral_jax.parallel.compilation_cache import compilation_cache_options
from mixtral_jax.parallel.memory import device_memory
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.plan.flops import model_flops_per_step
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import peak_memory_bytes

NUM_WARMUP_STEPS, NUM_MEASURED_STEPS = 2, 8
# The dense matmul that the step is compared with.
CEILING_ROWS = 2048
CEILING_FLOPS = 2e10


def describe_step(figures: dict[str, Any]) -> str:
    """The figures in a line for people."""
    return (
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['step_seconds_median']:.3f} s a "
        f"step, {figures['utilization']:.0%} of a dense matmul's "
        f"{figures['ceiling_flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{(figures['peak_memory_bytes'] or 0) / 2**20:,.0f} MiB a device"
    )


def measure_step(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compiles the real step, times it, and times a dense matmul in the same minute to compare."""
    device = mesh.devices.flat[0]
    ceiling = measure_ceiling(config, device)
    # Virtual CPU devices share the cores that one of them uses all of.
    ceiling *= 1 if count_cores(device) else mesh.size
    training = make_own_training(config, mesh)
    with jax.set_mesh(mesh):
        state, batch = training.init(), make_up_batch(config, mesh)
        flops = count_flops(training, state.model())
        step = compile_with_names(training, state, batch)

        def run_step() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(step(state, batch))

        seconds = []
        for _ in range(NUM_WARMUP_STEPS + NUM_MEASURED_STEPS):
            start = time.perf_counter()
            run_step()
            seconds.append(time.perf_counter() - start)
        parts = measure_parts(step, run_step)
    median = statistics.median(seconds[NUM_WARMUP_STEPS:])
    return {
        "tokens_per_second": config.train.batch_size * config.train.sequence_length / median,
        "step_seconds_median": median,
        "model_flops_per_step": flops,
        "ceiling_flops_per_second": ceiling,
        "utilization": flops / median / ceiling,
        "peak_memory_bytes": peak_memory_bytes(step),
        "profile": parts.to_json(),
    }


def make_own_training(config: Config, mesh: jax.sharding.Mesh) -> Training:
    """Training as a run of one process assembles it on these devices."""
    return make_training(config, mesh.devices.flat[0].platform, device_memory(Processes()))


def compile_with_names(training: Training, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    """The compiled step, whose operations have the names that this code gives them.

    By default, jax takes an equal program from its cache, whatever names that had.
    """
    with compilation_cache_options(jax_compilation_cache_include_metadata_in_key=True):
        return training.train_step.lower(state, batch).compile()


def count_flops(training: Training, model: Any) -> int:
    """The FLOPs that `model` needs for a step of `training`."""
    parameters = count_parameters(model, nnx.Param)
    trained = count_parameters(model, training.trainable)
    return model_flops_per_step(training.config, parameters, trained)


def make_up_batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """A batch of random tokens, one document per row, on the mesh."""
    train, vocab_size = config.train, config.model.vocab_size
    shape = (train.gradient_accumulation, train.micro_batch_size, train.sequence_length)
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (*shape[:2], shape[2] + 1), dtype=np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], ones, ones, positions)
    return jax.device_put(batch, jax.NamedSharding(mesh, batch_spec(AxisRules())))


def count_cores(device: Any) -> int | None:
    """The cores that compute for a device; None if it is more than a part of the CPU."""
    if device.platform != "cpu":
        return None
    # Only Linux says which cores this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure_ceiling(config: Config, device: Any) -> float:
    """FLOP/s of a dense matmul of an expert's shape, in the compute dtype, on one device."""
    rows, D, F = CEILING_ROWS, config.model.hidden_size, config.model.intermediate_size
    x = jax.device_put(jnp.ones((rows, D), config.model.dtype), device)
    weight = jax.device_put(jnp.ones((D, F), config.model.dtype), device)
    repeats = max(1, int(CEILING_FLOPS / (2 * rows * D * F)))

    @jax.jit
    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: (x @ weight) @ weight.T / F / D, x)

    multiply(x, weight).block_until_ready()
    start = time.perf_counter()
    multiply(x, weight).block_until_ready()
    return 4 * rows * D * F * repeats / (time.perf_counter() - start)
