"""What many tests start from: a small model, its kernels, a mesh by its sizes, a packed batch."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import Config, GroupedMatmulName, TransportName, build
from mixtral_jax.kernels.choose import Choice, Kernels, choose_kernels
from mixtral_jax.model.tokens import Tokens
from mixtral_jax.model.transformer import Transformer, model_maker
from mixtral_jax.parallel.batch import Batch, batch_spec
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.runs.console import make_console
from mixtral_jax.runs.run import Run
from mixtral_jax.training.assemble import make_training

RULES = AxisRules()


def small_config(**overrides: Any) -> Config:
    """A float32 model of 2 layers and 8 experts; overrides are dotted keys with __ for the dot."""
    mapping: dict[str, Any] = {
        "model": {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 12,
            "num_experts": 8,
            "dtype": "float32",
            "initializer_range": 0.1,
        },
        # It compiles faster than `blocks`, the default on CPUs: tests of that ask for it.
        "dispatch": {"grouped_matmul": "ragged_dot"},
        "train": {"num_steps": 12, "batch_size": 8, "sequence_length": 24},
    }
    for name, value in overrides.items():
        *sections, key = name.split("__")
        section = mapping
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return build(Config, mapping)


def cpu_model_maker(config: Config) -> Callable[[], Transformer]:
    """A function that initialises the config's model, with the kernels it has on CPUs."""
    return model_maker(config, choose_kernels(config, "cpu"))


def kernels_of(transport: TransportName, grouped_matmul: GroupedMatmulName) -> Kernels:
    """The kernels with these names, whatever a config would choose."""
    why = "for a test"
    return Kernels(
        Choice("xla", why),
        Choice(grouped_matmul, why),
        Choice(transport, why),
        Choice("full", why),
    )


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the axes named, all others 1, on the first devices."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[: math.prod(shape)])


def packed_batch(config: Config, seed: int = 0) -> Batch:
    """Random tokens on the host, in rows of one, two and three documents, some with padding."""
    rng = np.random.default_rng(seed)
    shape = (
        config.train.gradient_accumulation,
        config.train.micro_batch_size,
        config.train.sequence_length,
    )
    tokens = rng.integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1), dtype=np.int32)
    segments = np.ones(shape, np.int32)
    segments[:, 1::4, shape[2] // 3 :] = 2
    segments[:, 2::4, shape[2] // 4 :] = 2
    segments[:, 2::4, shape[2] // 2 :] = 3
    segments[:, 3::4, 2 * shape[2] // 3 :] = 0
    starts = np.diff(segments, axis=-1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(shape[2]), 0), axis=-1)
    positions = np.where(segments > 0, np.arange(shape[2]) - first, 0).astype(np.int32)
    ends_document = np.diff(segments, axis=-1, append=-1) != 0
    loss_mask = ((segments > 0) & ~ends_document).astype(np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], loss_mask, segments, positions)


def make_run(config: Config, mesh: jax.sharding.Mesh, workdir: Path, output: Any = None) -> Run:
    """A run of one process whose devices are up; its workdir is not opened. Prints to `output`."""
    console = make_console(is_writer=output is not None, output=output)
    return Run(config, mesh, workdir, console, Processes(), make_training(config, "cpu"))


def keep_some(cases: Mapping[str, Any], *kept: str) -> list[Any]:
    """Cases by name, to parametrize with: all but `kept` are for `make test-meshes` alone."""
    assert cases.keys() >= set(kept)
    return [
        pytest.param(case, id=name, marks=() if name in kept else pytest.mark.meshes)
        for name, case in cases.items()
    ]


def only_masked(is_real_BT: Any) -> Tokens:
    """Tokens of which only is known which are real."""
    zeros_BT = jnp.zeros_like(is_real_BT, jnp.int32)
    return Tokens(zeros_BT, zeros_BT, jnp.asarray(is_real_BT, jnp.int32))


def on_mesh(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The batch laid out as training lays it out."""
    return jax.device_put(batch, jax.NamedSharding(mesh, batch_spec(RULES)))


def relative_norm(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected; 0 when both vanish."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    difference, scale = np.linalg.norm(got - expected), np.linalg.norm(expected)
    return float(difference / scale) if scale else float(difference)
