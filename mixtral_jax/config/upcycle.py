"""The section `upcycle` of a config: a run that starts from a dense model, not random weights.

`finetune.upcycling` makes the experts from the dense layer.
"""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require
from mixtral_jax.config.finetune import PretrainConfig
from mixtral_jax.config.model import ModelConfig
from mixtral_jax.config.router import BLIND_CHOICES, RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Initialises experts from the dense layers of a trained model with num_experts=1.

    The source is Sparse Upcycling, arXiv 2212.05055.

    Attributes:
        base: anything that `--checkpoint` takes. With a `method` and no base, a dense model with
            the run's other sizes is pretrained.
        pretrain: how it is pretrained.
        method: `copy`: every expert is a copy of the dense layer; the default if there is a base.
            `noise`: adds normal noise of `noise_std` times the standard deviation of the weights.
            `drop`: draws a share `drop_fraction` of each expert's hidden units anew
            (Drop-Upcycling, arXiv 2502.19261).
        granularity: the number of experts that each copy is cut into (arXiv 2410.07524).
            `model.granularity` multiplies it, so usually only that one is set.
    """

    base: str | None = None
    pretrain: PretrainConfig = PretrainConfig()
    method: Literal["copy", "noise", "drop"] | None = None
    noise_std: float = 0.1
    drop_fraction: float = 0.5
    granularity: int = 1

    def __post_init__(self):
        require(self.base != "", "upcycle.base='' must name a checkpoint, or be None")
        self.pretrain.check("upcycle.pretrain")
        require(self.noise_std >= 0, f"upcycle.noise_std={self.noise_std} must not be negative")
        require(
            0 <= self.drop_fraction <= 1,
            f"upcycle.drop_fraction={self.drop_fraction} must lie between 0 and 1",
        )
        require(self.granularity >= 1, f"upcycle.granularity={self.granularity} must be at least 1")
        require(
            self.base or self.method,
            "upcycle needs upcycle.base: name a dense model, or set upcycle.method (copy, noise, "
            "drop) to pretrain one",
        )
        if self.method is None:
            # Set here, so that the run's config.json shows the method that is used.
            object.__setattr__(self, "method", "copy")

    def check(self, model: ModelConfig, router: RouterConfig) -> None:
        """Raises ConfigError if the dense layer cannot be turned into the experts of this model."""
        require(
            model.num_shared_experts == 0,
            "upcycle makes routed experts that add up to the dense layer, to which "
            f"model.num_shared_experts={model.num_shared_experts} would add more: set it to 0",
        )
        m, chosen = self.granularity, router.num_experts_per_token
        if m == 1:
            return
        require(
            model.num_experts % m == 0 and chosen % m == 0,
            f"upcycle.granularity={m} must divide model.num_experts={model.num_experts} and "
            f"router.num_experts_per_token={chosen}, since only the slices of whole copies add up "
            "to the dense layer: set it to a common divisor",
        )
        require(
            router.choice == "top_k" and self.scale(router) is not None,
            f"upcycle.granularity={m} needs router.choice=top_k, which chooses whole copies, and "
            "weights with a known sum: set router.score=softmax_chosen or router.renormalize=True; "
            f"with router.choice={router.choice}, score={router.score} and "
            f"renormalize={router.renormalize} the slices do not add up to the dense layer",
        )

    def scale(self, router: RouterConfig) -> float | None:
        """The factor of the experts' outputs that makes them add up to the dense layer's output.

        The slices of a copy share its weight, and the weights of a token sum to `router.scale`.
        None if there is no such factor, because the sum depends on the router's scores.
        """
        is_fixed = (
            router.choice in BLIND_CHOICES or router.score == "softmax_chosen" or router.renormalize
        )
        return self.granularity / router.scale if is_fixed else None
