"""Grouped matmul by the kernels of the package `tokamax`, for TPU and NVIDIA GPUs since Ampere."""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import jax

# Without "xla", which on GPUs multiplies every row by every expert, and to which tokamax would
# otherwise fall back.
IMPLEMENTATIONS = ("mosaic", "triton")


def find_obstacle(platform: str) -> str:
    """What the kernels need and do not get here; an empty string if they work."""
    if platform == "cpu":
        return "a TPU or an NVIDIA GPU"
    if importlib.util.find_spec("tokamax") is None:
        extra = "tpu" if platform == "tpu" else "cuda"
        return f"the package tokamax (pip install -e '.[{extra}]')"
    return ""


def ragged_dot(x_RD: jax.Array, weight_EDF: jax.Array, rows_per_expert_E: jax.Array) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r], [R, F], with tokamax's own gradient.

    It must be traced on the device that it will run on, from which tokamax chooses its kernel.
    """
    return _import_package().ragged_dot(
        x_RD, weight_EDF, rows_per_expert_E, implementation=IMPLEMENTATIONS
    )


@functools.cache
def _import_package() -> ModuleType:
    """Imports tokamax, which is optional and slow, and keeps it off command line and stderr."""
    package = importlib.import_module("tokamax")
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        # Otherwise tokamax parses our command line and ends the run at a flag it does not know.
        flags.mark_as_parsed()
    # It warns at length about every shape that has not been timed, and then rightly uses a
    # heuristic.
    logging.getLogger("absl").addFilter(
        lambda record: not record.getMessage().startswith("Autotuning cache miss")
    )
    return package
