"""Compiles the train step of a config for devices that are not here. Nothing is allocated."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.kernels.choose import choose_transport
from mixtral_jax.kernels.loops import count_expected_trips
from mixtral_jax.kernels.remat import tokens_per_device
from mixtral_jax.model.transformer import ParameterCount, count_parameters
from mixtral_jax.parallel.batch import Batch, batch_spec
from mixtral_jax.parallel.compilation_cache import compilation_cache_options
from mixtral_jax.parallel.mesh import make_mesh, matmul_precision, resolve_mesh
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.plan.hlo import Program, parse_program
from mixtral_jax.plan.meshes import describe_mesh, meshes_that_fit
from mixtral_jax.plan.topology import Target
from mixtral_jax.training.assemble import Training, make_training
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import peak_memory_bytes

_MAX_SHOWN_MESHES = 4


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device: the peak of a step, and what parameters and optimizer take of it."""

    peak: int
    parameters: int
    optimizer: int

    @property
    def rest(self) -> int:
        """Gradients, activations and buffers. Smaller micro-batches or more remat reduce them."""
        return max(0, self.peak - self.parameters - self.optimizer)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step compiled for `mesh`, and what the compiler reports about it.

    `config` has a number for every mesh axis, and a choice for `model.remat`. `traced` is the jaxpr
    of the step. `trained` counts the parameters that are trained, and `seconds` is the time to
    trace and compile.
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
        ConfigError: the mesh does not fit the topology, or the transport that the config asks for
            does not work there.
    """
    config = fit_mesh(config, target)
    # An estimate compiles for a CPU, where every transport works.
    choose_transport(config, target.topology.chip.kind)
    mesh = make_mesh(config.mesh, target.devices)
    training = _make_training(config, target)
    model_config = dataclasses.replace(config.model, remat=training.kernels.remat.name)
    config = dataclasses.replace(config, model=model_config)
    start = time.perf_counter()
    with _as_if_on(config, mesh):
        state = training.abstract_state()
        traced = _trace(training, state, mesh)
        lowered = traced.lower()
        compiled = _compile_for_tpu(lowered) if target.platform == "tpu" else lowered.compile()
    seconds = time.perf_counter() - start
    program = parse_program(
        compiled.as_text() or "", lambda loop: count_expected_trips(loop.op_name)
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
        trained=count_parameters(model, training.trainable),
        seconds=seconds,
    )


def trace_grouped(config: Config, target: Target) -> Any:
    """The jaxpr of the same step with each grouped matmul as one operation, for counting FLOPs.

    In a run they are loops, over blocks or over the chunks of a buffer with room to spare, whose
    length depends on the routing.

    Args:
        config: that of a `CompiledStep`.
    """
    dispatch = dataclasses.replace(config.dispatch, grouped_matmul="ragged_dot", buffer_factor=1.0)
    config = dataclasses.replace(config, dispatch=dispatch)
    mesh = make_mesh(config.mesh, target.devices)
    with _as_if_on(config, mesh):
        training = _make_training(config, target)
        return _trace(training, training.abstract_state(), mesh).jaxpr


def _make_training(config: Config, target: Target) -> Training:
    return make_training(config, target.platform, target.topology.chip.usable_bytes)


def fit_mesh(config: Config, target: Target) -> Config:
    """Returns the config with a number for every mesh axis, so that the mesh uses all devices.

    Raises:
        ConfigError: the mesh does not fit the topology. The message names meshes that do.
    """
    try:
        return resolve_mesh(config, target.topology.num_devices)
    except ConfigError as error:
        name, count = target.topology.name, target.topology.num_devices
        fitting = [describe_mesh(mesh) for mesh in meshes_that_fit(config, count)]
        rows = count * config.train.gradient_accumulation
        advice = (
            f"meshes that fit: {'; '.join(fitting[:_MAX_SHOWN_MESHES])}"
            if fitting
            else f"no mesh fits: make train.batch_size a multiple of {rows}"
        )
        # The rest of the message is advice for the devices of this machine.
        reason, _, _ = str(error).partition(": ")
        raise ConfigError(
            f"{reason}, so it does not fit the {count} devices of {name}; {advice}"
        ) from None


def count_routed_rows(config: Config) -> int:
    """The rows of one device's experts in a micro-batch under balanced routing.

    This equals the number of rows that the device's own tokens send to experts.
    """
    return tokens_per_device(config) * config.router.num_experts_per_token


@contextlib.contextmanager
def _as_if_on(config: Config, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Sets a run's mesh and precision. Libraries that ask for a device see one of the mesh."""
    precision = jax.default_matmul_precision(matmul_precision(config.model.dtype))
    with jax.set_mesh(mesh), precision, jax.default_device(mesh.devices.flat[0]):
        yield


def _trace(training: Training, state: TrainState, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """Traces the train step with a batch of shapes."""
    train = training.config.train
    rows: Any = jax.ShapeDtypeStruct(
        (train.gradient_accumulation, train.micro_batch_size, train.sequence_length),
        np.int32,
        sharding=jax.NamedSharding(mesh, batch_spec(AxisRules())),
    )
    batch = Batch(rows, rows, rows, rows, rows)
    return training.train_step.trace(state, batch)


def _compile_for_tpu(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without jax's compilation cache, which cannot load a program for absent devices."""
    with compilation_cache_options(jax_enable_compilation_cache=False):
        # Otherwise the compiler refuses what does not fit, and reports nothing about it.
        return lowered.compile({"xla_tpu_no_crash_on_oom": True})


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
