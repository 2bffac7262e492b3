"""A run that starts from a dense model instead of random weights: the section `upcycle` of a
config.

Leaves to `finetune.upcycling` how experts are made of a dense layer.
"""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require
from mixtral_jax.config.finetune import PretrainConfig
from mixtral_jax.config.model import ModelConfig
from mixtral_jax.config.router import BLIND_CHOICES, RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Experts that start as the dense layer of a trained model with num_experts=1 (Sparse
    Upcycling, arXiv 2212.05055).

    `base` takes what `--checkpoint` takes; with a `method` and no base, a dense model of the run's
    other sizes is pretrained as `pretrain` says. `method`: `copy` (that of a base without one),
    every expert is that layer; `noise`, plus normal noise of `noise_std` times the standard
    deviation of its weights; `drop`, a share `drop_fraction` of each expert's hidden units is drawn
    anew (Drop-Upcycling, arXiv 2502.19261). `granularity` cuts each copy into so many experts
    (arXiv 2410.07524); `model.granularity` multiplies it, so that it need not be set.
    """

    base: str | None = None
    pretrain: PretrainConfig = PretrainConfig()
    method: Literal["copy", "noise", "drop"] | None = None
    noise_std: float = 0.1
    drop_fraction: float = 0.5
    granularity: int = 1

    def __post_init__(self):
        require(self.base != "", "upcycle.base must name a checkpoint, or be None")
        self.pretrain.check("upcycle.pretrain")
        require(self.noise_std >= 0, f"upcycle.noise_std={self.noise_std} must not be negative")
        require(
            0 <= self.drop_fraction <= 1,
            f"upcycle.drop_fraction={self.drop_fraction} must lie between 0 and 1",
        )
        require(self.granularity >= 1, f"upcycle.granularity={self.granularity} must be at least 1")
        require(
            self.base or self.method,
            "upcycle needs upcycle.base, a dense model, or upcycle.method (copy, noise, drop), and "
            "pretrains one",
        )
        if self.method is None:
            object.__setattr__(
                self, "method", "copy"
            )  # As it is written into the run's config.json.

    def check(self, model: ModelConfig, router: RouterConfig) -> None:
        """Raises ConfigError where the dense layer cannot be made experts of."""
        require(
            model.num_shared_experts == 0,
            "upcycle makes routed experts that add up to the dense layer, and "
            "model.num_shared_experts="
            f"{model.num_shared_experts} would add to that: set it to 0",
        )
        m, chosen = self.granularity, router.num_experts_per_token
        if m == 1:
            return
        require(
            model.num_experts % m == 0 and chosen % m == 0,
            f"upcycle.granularity={m} must divide model.num_experts={model.num_experts} and "
            f"router.num_experts_per_token={chosen}: only the slices of whole copies add up to the "
            "dense layer",
        )
        require(
            router.choice == "top_k" and self.scale(router) is not None,
            f"upcycle.granularity={m} needs router.choice=top_k, which takes whole copies, and "
            "weights whose sum is "
            "known, router.score=softmax_chosen or router.renormalize=True: with "
            f"router.choice={router.choice}, "
            f"score={router.score} and renormalize={router.renormalize} the slices do not add up "
            "to the dense layer",
        )

    def scale(self, router: RouterConfig) -> float | None:
        """What outputs of experts are multiplied by, so that those of a token add up to the dense
        layer's.

        A copy's slices share its weight, and weights sum to `router.scale`. None where no number
        does it, since the sum of the weights depends on what the router says.
        """
        is_fixed = (
            router.choice in BLIND_CHOICES or router.score == "softmax_chosen" or router.renormalize
        )
        return self.granularity / router.scale if is_fixed else None
