"""Counts the FLOPs of a step: those that the model needs, and those that the program executes.

Executed FLOPs are counted in the compiled program, because only there a worst-case buffer is
multiplied as a whole and matmuls are recomputed. Pallas kernels are opaque there, so their FLOPs
are counted in the traced step. So are all FLOPs if loops depend on the routing. A multiply-add is
two operations in any precision; nothing else is counted.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.interpreters import partial_eval

from mixtral_jax.config import Config
from mixtral_jax.kernels.loops import count_expected_trips
from mixtral_jax.model.transformer import ParameterCount
from mixtral_jax.plan.hlo import Array, Computation, Instruction, Program


def model_flops_per_step(
    config: Config, parameters: ParameterCount, trained: ParameterCount
) -> int:
    """The FLOPs that the model needs for a step, without recomputation.

    Per token and active parameter: 6, or 4 if the parameter is frozen, because it then has no
    gradient. The embedding look-up counts nothing. Per token and layer: 6 N H T for the scores and
    values of causal attention (PaLM, arXiv 2204.02311, appendix B, halved).

    Args:
        parameters: all parameters of the model.
        trained: the parameters that are trained.
    """
    model, train = config.model, config.train
    per_token = 4 * parameters.multiplying + 2 * trained.multiplying
    per_token += 6 * model.num_layers * model.num_heads * model.head_dim * train.sequence_length
    return per_token * train.batch_size * train.sequence_length


def count_program_flops(program: Program, routed_rows: int) -> int | None:
    """FLOPs of one device's matmuls in a step, without Pallas kernels.

    Args:
        routed_rows: the rows of a grouped matmul under balanced routing, over all experts of a
            device. XLA's kernel skips the rest of its buffer.

    Returns:
        None if a loop with matmuls has a length that is known only at run time.
    """
    total = 0
    for computation, instruction, times in program.instructions():
        counted = instruction_flops(computation, instruction, routed_rows)
        if counted and times is None:
            return None
        total += counted * (times or 0)
    return total


def instruction_flops(computation: Computation, instruction: Instruction, routed_rows: int) -> int:
    """FLOPs of one run of a matmul, and 0 for any other instruction."""
    if instruction.opcode in ("convolution", "dot"):
        flops = _convolution if instruction.opcode == "convolution" else _dot
        operands = computation.operands(instruction)
        return flops(instruction, *(operand.results[0] for operand in operands))
    if is_ragged_dot(instruction):
        return _ragged_dot(computation, instruction, routed_rows)
    return 0


def is_ragged_dot(instruction: Instruction) -> bool:
    """True for the grouped matmul that XLA:TPU makes of `jax.lax.ragged_dot`."""
    return instruction.opcode == "custom-call" and "ragged_dot_tiling=" in instruction.rest


def count_traced_flops(closed: Any, routed_rows: int, *, only_pallas: bool = False) -> int:
    """FLOPs of the matmuls in a traced step (a `ClosedJaxpr`), over all devices.

    Operations whose results nothing uses do not count. A Pallas kernel counts by its own cost
    estimate. Without one, it counts as its body times its grid, which is too much if it skips grid
    points at run time. Grouped matmuls count their rows under balanced routing.
    """
    return _traced(closed.jaxpr, routed_rows, only_pallas)


def _traced(jaxpr: Any, routed_rows: int, only_pallas: bool) -> int:
    total = 0
    # Remove dead code at every level, because jax does not do it inside while loops.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "pallas_call":
            total += _pallas(eqn, routed_rows)
        elif name == "dot_general":
            total += 0 if only_pallas else _traced_dot(eqn)
        elif name == "ragged_dot_general":
            total += 0 if only_pallas else _traced_ragged_dot(eqn, routed_rows)
        else:
            subs = [_live_body(eqn, jaxpr)] if name == "while" else _inner_jaxprs(params)
            inner = [_traced(sub, routed_rows, only_pallas) for sub in subs]
            counted = max(inner, default=0) if name == "cond" else sum(inner)
            total += _times(eqn, routed_rows) * counted if counted else 0
    return total


def _times(eqn: Any, routed_rows: int) -> int:
    """How often an operation runs its inner jaxprs."""
    if eqn.primitive.name == "while":
        trips = count_expected_trips(str(eqn.source_info.name_stack))
        if trips is None:
            raise ValueError(
                "the length of a loop with matmuls depends on the data: trace with ragged_dot"
            )
        return trips
    sizes = {
        "scan": lambda params: params["length"],
        "shard_map": lambda params: params["mesh"].size,
    }
    return sizes.get(eqn.primitive.name, lambda params: 1)(eqn.params)


def _live_body(loop: Any, jaxpr: Any) -> Any:
    """The body of a while loop in `jaxpr`, without what only carries unused results on.

    These are the gradients of frozen weights, for example. XLA removes them too.
    """
    users = [jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns)]
    used = {id(value) for values in users for value in values}
    live = [id(result) in used for result in loop.outvars]
    while True:
        body, needed = partial_eval.dce_jaxpr(loop.params["body_jaxpr"].jaxpr, live)
        needed = needed[loop.params["body_nconsts"] :]
        grown = [a or b for a, b in zip(live, needed, strict=True)]
        if grown == live:
            return body
        live = grown


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an operation's parameters, also inside tuples (branches of a `cond`)."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner


def _pallas(eqn: Any, routed_rows: int) -> int:
    """FLOPs of a kernel. Megablox (in jax and tokamax) counts its rows under balanced routing."""
    params, grid = eqn.params, eqn.params["grid_mapping"].grid
    if params["cost_estimate"] is not None:
        flops = int(params["cost_estimate"].flops)
    elif all(isinstance(size, int) for size in grid):
        flops = math.prod(grid) * _traced(params["jaxpr"], routed_rows, False)
    else:
        raise ValueError(
            f"cannot count a Pallas kernel without a cost estimate and with unknown grid {grid}"
        )
    if "gmm" in str(params.get("name", "")):
        R = eqn.invars[-2].aval.shape[0]
        return flops * min(R, routed_rows) // R
    return flops


def _traced_dot(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2 * math.prod(out.shape) * math.prod(lhs.shape[dimension] for dimension in contracting)


def _traced_ragged_dot(eqn: Any, routed_rows: int) -> int:
    """Each row counts once, if it is kept ([R, K] x [E, K, N]) or contracted ([R, K] x [R, N])."""
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    R, K = lhs.shape
    return 2 * min(R, routed_rows) * K * out.shape[-1]


def _dot(instruction: Instruction, lhs: Array, rhs: Array) -> int:
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    sizes = (
        [lhs.dimensions[int(number)] for number in contracting.group(1).split(",") if number]
        if contracting
        else []
    )
    return 2 * math.prod(instruction.results[0].dimensions) * math.prod(sizes)


def _ragged_dot(computation: Computation, instruction: Instruction, routed_rows: int) -> int:
    lhs = computation.operands(instruction)[-2].results[0]
    R, K = lhs.dimensions
    return 2 * min(R, routed_rows) * K * instruction.results[0].dimensions[-1]


def _convolution(instruction: Instruction, lhs: Array, rhs: Array) -> int:
    """FLOPs of a convolution.

    XLA:TPU writes every matmul as one. Its batch dimensions become spatial dimensions, in which
    only few pairs of positions meet.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels, instruction.rest[:200]
    sizes = [
        dict(zip(label, array.dimensions, strict=True))
        for label, array in zip(labels.groups(), (lhs, rhs, instruction.results[0]), strict=True)
    ]
    in_size, kernel_size, out_size = sizes
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    batch = in_size["b"] // (int(groups.group(1)) if groups else 1)
    flops = 2 * batch * kernel_size["i"] * kernel_size["o"]
    spatial = sorted(label for label in kernel_size if label.isdigit())
    for place, label in enumerate(spatial):
        flops *= _meetings(
            instruction.rest, place, in_size[label], kernel_size[label], out_size[label]
        )
    return flops


def _meetings(attributes: str, place: int, in_size: int, kernel_size: int, out_size: int) -> int:
    """Counts the pairs of an output and a kernel position that meet an input element.

    The other pairs meet padding, or a hole of a dilation.
    """
    stride = _window(attributes, "stride", place, 1)
    in_dilation, kernel_dilation = (
        _window(attributes, "lhs_dilate", place, 1),
        _window(attributes, "rhs_dilate", place, 1),
    )
    padding = _window(attributes, "pad", place, 0)
    position = (
        np.arange(out_size)[:, None] * stride
        + np.arange(kernel_size)[None] * kernel_dilation
        - padding
    )
    inside = (position >= 0) & (position % in_dilation == 0) & (position // in_dilation < in_size)
    return int(np.sum(inside))


def _window(attributes: str, name: str, place: int, default: int) -> int:
    """One number of a window attribute, such as `window={size=8x4 stride=7x1 pad=0_0x3_3}`.

    `place` is the index of the spatial dimension. For a pad, the number is that of the low side.
    """
    found = re.search(rf"window=\{{[^}}]*\b{name}=([\w\-]+)", attributes)
    return int(found.group(1).split("x")[place].split("_")[0]) if found else default
