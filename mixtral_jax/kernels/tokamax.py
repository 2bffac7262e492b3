"""Grouped matmul by tokamax's kernels for TPU and for NVIDIA GPUs from Ampere on (package
`tokamax`).
"""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import jax

# Never "xla", which tokamax would fall back to: on GPUs that multiplies every row by every expert.
IMPLEMENTATIONS = ("mosaic", "triton")


def find_obstacle(platform: str) -> str:
    """What the kernels need and do not have, or an empty string."""
    if platform == "cpu":
        return "a TPU or an NVIDIA GPU"
    if importlib.util.find_spec("tokamax") is None:
        extra = "tpu" if platform == "tpu" else "cuda"
        return f"the package tokamax (pip install '.[{extra}]')"
    return ""


def ragged_dot(x_RD: jax.Array, weight_EDF: jax.Array, rows_per_expert_E: jax.Array) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r], [R, F], with tokamax's own gradient.

    Traced on the device that it will run on: tokamax looks at that to choose its kernel.
    """
    return _import_package().ragged_dot(
        x_RD, weight_EDF, rows_per_expert_E, implementation=IMPLEMENTATIONS
    )


@functools.cache
def _import_package() -> ModuleType:
    """tokamax, an extra and slow to import, told to leave our command line and standard error
    alone.
    """
    package = importlib.import_module("tokamax")
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        # Or tokamax looks for its flags on our command line, and ends the run at one of ours.
        flags.mark_as_parsed()
    # For every matrix it says at length that nobody has timed this shape; a heuristic chooses then,
    # as it should.
    logging.getLogger("absl").addFilter(
        lambda record: not record.getMessage().startswith("Autotuning cache miss")
    )
    return package
