"""Grouped matmul by tokamax's kernels for TPU and for NVIDIA GPUs from Ampere on (package `tokamax`)."""

import importlib
import importlib.util

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
    package = importlib.import_module("tokamax")  # An extra, and slow to import.
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # Or tokamax looks for its flags on our command line, and ends the run at one of ours.
    return package.ragged_dot(x_RD, weight_EDF, rows_per_expert_E, implementation=IMPLEMENTATIONS)
