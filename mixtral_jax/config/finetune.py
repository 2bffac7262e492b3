"""What a tuning run trains, and of which model: the section `finetune` of a config.

Leaves to `finetune.targets` which projections a pattern names.
"""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): W x + alpha / rank * B A x with W frozen.

    `rank=0` has none, and trains the whole model. `alpha=None` is 2 * rank, mistral-finetune's
    scaling of 2. `targets` is a preset (`attention`, `attention+experts`,
    `attention+experts+router`) or patterns with commas between, as in
    `attention.*,moe.experts.down`. `dropout` is the share of an adapter's inputs that a micro-batch
    goes without: the same features for each of its tokens, as in LoRA Dropout (arXiv 2404.09610).
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
            f"finetune.lora.dropout={self.dropout} needs adapters to drop from: set "
            "finetune.lora.rank",
        )

    @property
    def scaling(self) -> float:
        """What an adapter's product counts."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The base that a run pretrains for itself where none is named: on which text, how long, how
    fast.

    Shape, tokenizer, mesh, length of rows and seed are those of the run; all else is by default.
    `batch_size` is in sequences a step. `path=None` is the text of the run, or in tuning, which has
    conversations instead, python-stdlib.
    """

    path: str | None = None
    num_steps: int = 400
    batch_size: int = 16
    learning_rate: float = 4e-3

    def check(self, section: str) -> None:
        """Raises ConfigError where a setting of `section` is out of range."""
        require(
            self.path != "",
            f"{section}.path must name a file, a folder, a glob, hub:NAME, or python-stdlib",
        )
        for name in ("num_steps", "batch_size", "learning_rate"):
            require(
                getattr(self, name) > 0, f"{section}.{name}={getattr(self, name)} must be positive"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which model is tuned, and how much of it.

    `base` takes what `--checkpoint` takes; without one, a small one is made as `pretrain` says.
    `frozen_dtype` is how the frozen weights under adapters are kept (None: in `model.param_dtype`,
    as what is trained). The router is trained in full tuning, or with `+router`, as fast as
    router.learning_rate_factor says.
    """

    base: str | None = None
    pretrain: PretrainConfig = PretrainConfig()
    lora: LoRAConfig = LoRAConfig()
    frozen_dtype: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self):
        require(self.base != "", "finetune.base must name a checkpoint, or be None")
        self.pretrain.check("finetune.pretrain")
        require(
            self.lora.rank or self.frozen_dtype is None,
            f"finetune.frozen_dtype={self.frozen_dtype} is for adapters: with finetune.lora.rank=0 "
            "all weights learn, "
            "in model.param_dtype",
        )
