"""The section `finetune` of a config: which model a tuning run tunes, and what it trains.

`finetune.targets` translates patterns to names of projections.
"""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): W x + alpha / rank * B A x with W frozen.

    Attributes:
        rank: 0 trains the whole model, without adapters.
        alpha: None means 2 * rank, which gives mistral-finetune's scaling of 2.
        dropout: the share of an adapter's input features that is dropped in a micro-batch; the
            same features for all its tokens, as in LoRA Dropout (arXiv 2404.09610).
        targets: a preset (`attention`, `attention+experts`, `attention+experts+router`) or
            patterns separated by commas, as in `attention.*,moe.experts.down`.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "attention+experts"

    def __post_init__(self):
        require(
            self.rank >= 0,
            f"finetune.lora.rank={self.rank} must be at least 1, or 0 to train the whole model",
        )
        require(
            self.alpha is None or self.alpha > 0,
            f"finetune.lora.alpha={self.alpha} must be positive",
        )
        require(0 <= self.dropout < 1, f"finetune.lora.dropout={self.dropout} must lie in [0, 1)")
        require(
            self.rank or not self.dropout,
            f"finetune.lora.dropout={self.dropout} needs adapters: set finetune.lora.rank to at "
            "least 1",
        )

    @property
    def scaling(self) -> float:
        """The factor of an adapter's output."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a run pretrains its own base model if the config names none.

    Shape, tokenizer, mesh, sequence length and seed are those of the run; everything else has its
    default.

    Attributes:
        path: the text. None means that of the run; in tuning, whose data are conversations, it
            means python-stdlib.
        batch_size: sequences per step.
    """

    path: str | None = None
    num_steps: int = 400
    batch_size: int = 16
    learning_rate: float = 4e-3

    def check(self, section: str) -> None:
        """Raises ConfigError if a setting is out of range; `section` is its place in the config."""
        require(
            self.path != "",
            f"{section}.path='' must name a file, a folder, a glob, hub:NAME, or python-stdlib",
        )
        for name in ("num_steps", "batch_size", "learning_rate"):
            require(
                getattr(self, name) > 0, f"{section}.{name}={getattr(self, name)} must be positive"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which model is tuned, and how much of it.

    The router is trained in full tuning, or if the targets contain it; its learning rate is
    multiplied by `router.learning_rate_factor`.

    Attributes:
        base: anything that `--checkpoint` takes. Without it a small model is pretrained.
        pretrain: how it is pretrained.
        lora: the adapters.
        frozen_dtype: the dtype of the frozen weights under adapters; None means
            `model.param_dtype`, as for the trained ones.
    """

    base: str | None = None
    pretrain: PretrainConfig = PretrainConfig()
    lora: LoRAConfig = LoRAConfig()
    frozen_dtype: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self):
        require(self.base != "", "finetune.base='' must name a checkpoint, or be None")
        self.pretrain.check("finetune.pretrain")
        require(
            self.lora.rank or self.frozen_dtype is None,
            f"finetune.frozen_dtype={self.frozen_dtype} is for adapters, and with "
            "finetune.lora.rank=0 all weights are trained: set model.param_dtype instead",
        )
