"""The sections `optimizer`, `train`, `checkpoint` and `log` of a config."""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require

# Each name is an implementation in training/optimizer.py.
OptimizerName = Literal["adamw", "adafactor", "muon"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, with linear warm-up and cosine decay. Weight decay applies to matrices only.

    The schedule is given in fractions of the run, so it follows `train.num_steps`.

    - `name`: `adamw` keeps two moments of each parameter. `adafactor` keeps a second moment alone,
      as two vectors per matrix. `muon` keeps a first moment alone of each matrix in the layers, and
      makes their updates orthogonal; the router, norms and embeddings learn by AdamW.
    - `beta1` is the decay of the first moment: of AdamW, and of Muon's momentum too.
    - `beta2` and `epsilon` are those of AdamW.
    - `first_moment_dtype` is the dtype in which first moments are stored. None: that of the
      parameter.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 3e-4
    final_learning_rate_fraction: float = 0.1
    warmup_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    first_moment_dtype: Literal["bfloat16", "float32"] | None = None
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self):
        require(
            self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive"
        )
        for name in ("final_learning_rate_fraction", "warmup_fraction"):
            require(
                0 <= getattr(self, name) <= 1,
                f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]",
            )
        for name in ("beta1", "beta2"):
            require(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)",
            )
        for name in ("epsilon", "max_grad_norm"):
            require(
                getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)} must be positive"
            )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay={self.weight_decay} must not be negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of a run, the shape of its batches, and how often it evaluates and logs.

    `batch_size`: sequences of `sequence_length` tokens per optimizer step, over all devices. They
    are computed in `gradient_accumulation` equal micro-batches. `eval_every` and `log_every` are in
    steps; `eval_every=None` evaluates ten times per run.
    """

    num_steps: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int = 1
    seed: int = 0
    eval_every: int | None = None
    eval_sequences: int = 64
    log_every: int = 10

    def __post_init__(self):
        for name in (
            "num_steps",
            "batch_size",
            "gradient_accumulation",
            "log_every",
            "eval_sequences",
        ):
            require(
                getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1"
            )
        require(
            self.sequence_length >= 2,
            f"train.sequence_length={self.sequence_length} must be at least 2",
        )
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in [0, 2**32)")
        require(
            self.eval_every is None or self.eval_every >= 1,
            f"train.eval_every={self.eval_every} must be at least 1, or None (ten times per run)",
        )
        require(
            self.batch_size % self.gradient_accumulation == 0,
            f"train.batch_size={self.batch_size} must be a multiple of "
            f"train.gradient_accumulation={self.gradient_accumulation}",
        )

    @property
    def micro_batch_size(self) -> int:
        """The number of sequences of one micro-batch, over all devices."""
        return self.batch_size // self.gradient_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save checkpoints, and how many to keep.

    `every` is in steps; None saves four times per run. The last step is always saved.
    """

    every: int | None = None
    keep: int = 2

    def __post_init__(self):
        require(
            self.every is None or self.every >= 1,
            f"checkpoint.every={self.every} must be at least 1, or None (four times per run)",
        )
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go, in addition to the console and metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None
