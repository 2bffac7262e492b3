"""Low-rank adapters (LoRA, arXiv 2106.09685): a projection with two thin trainable ones beside it.

The two are A [inputs, r] and B [r, outputs], projections of the same type as the one they adapt.
Each expert has its own A and B. They are on the same device as the expert, are gathered like its
weights, and multiply its rows with the same grouped kernel.

B starts at zero. At step 0 an adapter therefore adds 0 to the output of the plain projection, which
changes no bit of it. Adapted experts run three projections one after the other, where plain experts
run one fused kernel. This changes no bit either, since both cut the rows into the same blocks and
multiply each block in the same way (tests/kernels/test_grouped_matmul.py).
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import P

from mixtral_jax.config import LoRAConfig, ModelConfig
from mixtral_jax.kernels.groups import RowGroups
from mixtral_jax.model.layers import Projection
from mixtral_jax.model.moe import ExpertProjection


class LoRAProjection(nnx.Module):
    """A dense projection and its adapter: x W + scaling * (x A) B.

    `config.param_dtype` is the dtype in which A and B are stored.
    """

    def __init__(self, base: Projection, lora: LoRAConfig, config: ModelConfig, rngs: nnx.Rngs):
        x, inputs, outputs, y = _spell(base)
        low = "".join(letter for letter in x if letter not in inputs) + "r"
        shape, axes, count = base.weight.shape, base.axes, len(inputs)
        shared: dict[str, Any] = {
            "config": config,
            "rules": base.rules,
            "rngs": rngs,
            "dtype": base.dtype,
            "variable": nnx.LoRAParam,
        }
        self.base = base
        self.scaling = lora.scaling
        self.lora_a = Projection(
            f"{x},{inputs}r->{low}",
            (*shape[:count], lora.rank),
            (*axes[:count], None),
            init=_kaiming_uniform(range(count)),
            **shared,
        )
        self.lora_b = Projection(
            f"{low},r{outputs}->{y}",
            (lora.rank, *shape[count:]),
            (None, *axes[count:]),
            init=nnx.initializers.zeros,
            **shared,
        )

    def __call__(self, x: jax.Array, out_sharding: P) -> jax.Array:
        low_BTr = self.lora_a(x, P(*out_sharding[:2], None))
        return self.base(x, out_sharding) + self.lora_b(self.scaling * low_BTr, out_sharding)

    def input_weights(self) -> tuple[nnx.Variable, ...]:
        """The variables that multiply this projection's input: those of the base and of A."""
        return (*self.base.input_weights(), *self.lora_a.input_weights())


class LoRAExpertProjection(nnx.Module):
    """One matrix and one adapter per expert, applied to rows that are sorted by expert."""

    def __init__(
        self, base: ExpertProjection, lora: LoRAConfig, config: ModelConfig, rngs: nnx.Rngs
    ):
        E, D, F = base.weight.shape
        expert, inputs, outputs = base.axes
        shared: dict[str, Any] = {
            "config": config,
            "rules": base.rules,
            "rngs": rngs,
            "variable": nnx.LoRAParam,
        }
        self.base = base
        self.scaling = lora.scaling
        self.lora_a = ExpertProjection(
            (E, D, lora.rank),
            (expert, inputs, None),
            base.kernel,
            init=_kaiming_uniform([1], experts=0),
            **shared,
        )
        self.lora_b = ExpertProjection(
            (E, lora.rank, F),
            (expert, None, outputs),
            base.kernel,
            init=nnx.initializers.zeros,
            **shared,
        )

    def __call__(self, x_RD: jax.Array, groups: RowGroups) -> jax.Array:
        low_Rr = self.lora_a(x_RD, groups)
        return self.base(x_RD, groups) + self.lora_b(self.scaling * low_Rr, groups)

    def input_weights(self) -> tuple[nnx.Variable, ...]:
        """The variables that multiply this projection's input: those of the base and of A."""
        return (*self.base.input_weights(), *self.lora_a.input_weights())


Plain = Projection | ExpertProjection
Adapted = LoRAProjection | LoRAExpertProjection


def adapt(base: Plain, lora: LoRAConfig, config: ModelConfig, rngs: nnx.Rngs) -> Adapted:
    """The projection with a new adapter, which adds 0 to its output."""
    if isinstance(base, ExpertProjection):
        return LoRAExpertProjection(base, lora, config, rngs)
    return LoRAProjection(base, lora, config, rngs)


def _spell(base: Projection) -> tuple[str, str, str, str]:
    """The letters of x, the weight's inputs, its outputs, and y, such as BTNH, NH, D, BTD."""
    x, weight, y = re.split(",|->", base.equation)
    inputs = "".join(letter for letter in weight if letter not in y)
    assert weight.startswith(inputs), base.equation
    return x, inputs, weight.removeprefix(inputs), y


def _kaiming_uniform(inputs: Sequence[int], *, experts: int | tuple[()] = ()) -> nnx.Initializer:
    """U(-1/sqrt(n), 1/sqrt(n)) for n inputs, as torch, PEFT and mistral-finetune have it."""
    return nnx.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=tuple(inputs), out_axis=-1, batch_axis=experts
    )
