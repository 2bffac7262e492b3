"""Compiles the train step of a config for devices that are not here; nothing is allocated."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.finetune.tunable import Tunable, make_tunable
from mixtral_jax.kernels.choose import choose_transport
from mixtral_jax.kernels.chunks import count_balanced_chunks
from mixtral_jax.model.transformer import ParameterCount, count_parameters
from mixtral_jax.parallel.batch import Batch, batch_spec
from mixtral_jax.parallel.mesh import make_mesh, matmul_precision, resolve_mesh
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.plan.hlo import Program, parse_program
from mixtral_jax.plan.meshes import describe_mesh, meshes_that_fit
from mixtral_jax.plan.topology import Target
from mixtral_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.train.state import TrainState, abstract_state
from mixtral_jax.train.step import make_train_step, peak_memory_bytes


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device at the fullest moment of a step.

    The rest is gradients, activations and buffers.
    """

    peak: int
    parameters: int
    optimizer: int

    @property
    def rest(self) -> int:
        """What a smaller micro-batch, or more recomputation, could lessen."""
        return max(0, self.peak - self.parameters - self.optimizer)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step compiled for `mesh`;

    `config` has its mesh as numbers. `traced` is the jaxpr it came from.
    """

    config: Config
    mesh: jax.sharding.Mesh
    program: Program
    traced: Any
    memory: StepMemory
    parameters: ParameterCount
    trained: ParameterCount
    seconds: float


def compile_step(config: Config, target: Target) -> CompiledStep:
    """Traces, lowers and compiles the step that a run would take on these devices, of any size.

    Raises:
        ConfigError: the mesh does not fit the topology, or the transport asked for does not work
            there.
    """
    config = fit_mesh(config, target)
    choose_transport(
        config, target.topology.chip.kind
    )  # An estimate compiles for a CPU, where all of them work.
    mesh = make_mesh(config.mesh, target.devices)
    tunable = make_tunable(config, target.platform)
    start = time.perf_counter()
    with _as_if_on(config, mesh):
        state, traced = _trace(config, mesh, tunable)
        # Without it the compiler refuses what does not fit, and says nothing more of it.
        options: dict[str, str | bool] = (
            {"xla_tpu_no_crash_on_oom": True} if target.platform == "tpu" else {}
        )
        compiled = traced.lower().compile(compiler_options=options)
    seconds = time.perf_counter() - start
    routed_rows = count_routed_rows(config)
    program = parse_program(
        compiled.as_text() or "", lambda loop: count_balanced_chunks(loop.op_name, routed_rows)
    )
    memory = StepMemory(
        peak=peak_memory_bytes(compiled) or 0,
        parameters=_bytes_per_device((state.trained, state.frozen)),
        optimizer=_bytes_per_device(state.opt_state),
    )
    model: Any = state.model()
    return CompiledStep(
        config=config,
        mesh=mesh,
        program=program,
        traced=traced.jaxpr,
        memory=memory,
        parameters=count_parameters(model),
        trained=count_parameters(model, tunable.trainable),
        seconds=seconds,
    )


def trace_grouped(config: Config, target: Target) -> Any:
    """The jaxpr of the same step with grouped matmuls as one operation each, for counting them.

    `config` is that of a `CompiledStep`. Written as loops, over blocks or over the chunks of a
    buffer with room to spare, they are as long as the routing makes them.
    """
    dispatch = dataclasses.replace(config.dispatch, grouped_matmul="ragged_dot", buffer_factor=1.0)
    config = dataclasses.replace(config, dispatch=dispatch)
    mesh = make_mesh(config.mesh, target.devices)
    with _as_if_on(config, mesh):
        return _trace(config, mesh, make_tunable(config, target.platform))[1].jaxpr


def fit_mesh(config: Config, target: Target) -> Config:
    """The config with its mesh as numbers that fill the topology.

    Raises:
        ConfigError: it does not fit; names meshes that would.
    """
    try:
        return resolve_mesh(config, target.topology.num_devices)
    except ConfigError as error:
        name, count = target.topology.name, target.topology.num_devices
        fitting = [describe_mesh(mesh) for mesh in meshes_that_fit(config, count)]
        rows = count * config.train.gradient_accumulation
        advice = (
            f"meshes that would: {'; '.join(fitting[:4])}"
            if fitting
            else f"no mesh does: make train.batch_size a multiple of {rows}"
        )
        reason, _, _ = str(error).partition(": ")  # Its advice is for the devices that are here.
        raise ConfigError(
            f"{reason}, so it does not fit the {count} devices of {name}; {advice}"
        ) from None


def count_routed_rows(config: Config) -> int:
    """Rows of a device's experts in a micro-batch if routing is even: as many as its own tokens
    send out.
    """
    mesh, train = config.mesh, config.train
    holders = (mesh.data or 1) * mesh.fsdp * (mesh.expert or 1)
    return (
        train.micro_batch_size
        * train.sequence_length
        // holders
        * config.router.num_experts_per_token
    )


@contextlib.contextmanager
def _as_if_on(config: Config, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """A run's mesh and precision; libraries that look which device this is see one of the mesh."""
    precision = jax.default_matmul_precision(matmul_precision(config.model.dtype))
    with jax.set_mesh(mesh), precision, jax.default_device(mesh.devices.flat[0]):
        yield


def _trace(
    config: Config, mesh: jax.sharding.Mesh, tunable: Tunable
) -> tuple[TrainState, jax.stages.Traced]:
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, config.router.learning_rate_factor)
    state = abstract_state(tunable.make_model, optimizer, tunable.trainable)
    train = config.train
    rows = jax.ShapeDtypeStruct(
        (train.gradient_accumulation, train.micro_batch_size, train.sequence_length),
        np.int32,
        sharding=jax.NamedSharding(mesh, batch_spec(AxisRules())),
    )
    shapes: Any = rows  # The batch is of shapes, not of arrays.
    batch = Batch(shapes, shapes, shapes, shapes, shapes)
    return state, make_train_step(optimizer, config.router, schedule, tunable.perturb).trace(
        state, batch
    )


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
