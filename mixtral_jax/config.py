"""Every setting of a run, as frozen and validated dataclasses.

Knows no jax, so that reading or checking a config starts no back end. What depends on the devices
(does the mesh fit them?) is checked by `parallel.mesh`, what depends on the data by `data`.
"""

import dataclasses
import re
from typing import Literal

from mixtral_jax.config_errors import ConfigError, require
from mixtral_jax.config_finetune import FinetuneConfig, LoRAConfig, PretrainConfig
from mixtral_jax.config_model import ModelConfig
from mixtral_jax.config_router import BLIND_CHOICES, BalanceBiasConfig, LoadBalanceConfig, NoiseConfig, RouterConfig
from mixtral_jax.config_upcycle import UpcycleConfig

__all__ = [
    "BLIND_CHOICES", "BalanceBiasConfig", "ChatConfig", "ChatFormat", "CheckpointConfig", "Config", "ConfigError",
    "DataConfig", "DispatchConfig", "FinetuneConfig", "LiteralInst", "LoRAConfig", "LoadBalanceConfig", "LogConfig",
    "MeshConfig", "ModelConfig", "NoiseConfig", "OptimizerConfig", "PretrainConfig", "RouterConfig", "TemplateName",
    "TrainConfig", "UpcycleConfig", "require",
]  # fmt: skip

TemplateName = Literal["auto", "v1", "v3"]
LiteralInst = Literal["reject", "keep", "strip"]
ChatFormat = Literal["auto", "messages", "interactions", "conversations", "alpaca", "prompt_completion", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How rows travel to their experts, and which kernel multiplies them there.

    `transport`: see the files of model/dispatch; `auto`, the best one here. `capacity_factor=None` drops nothing; a
    number drops a sequence's routes over ceil(capacity_factor * k * n / E) an expert: those of lowest weight, or with
    `drop="position"` the last ones. `eval_capacity_factor` is that of a run's own evaluations (None: the same; E / k
    drops nothing); a model that is loaded drops nothing. `buffer_factor=None` gives a device room for all rows it can
    ever get; a number, for that times the rows of a balanced routing: fewer bytes, and rows beyond it are lost and
    counted. `grouped_matmul`: `blocks` (loops over blocks of rows), `ragged_dot` (XLA's), `tokamax`, or `auto`, the
    best one here.
    """

    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    drop: Literal["weight", "position"] = "weight"
    buffer_factor: float | None = None
    grouped_matmul: Literal["auto", "blocks", "ragged_dot", "tokamax"] = "auto"

    def __post_init__(self):
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            require(factor is None or factor > 0, f"dispatch.{name}={factor} must be positive, or None to drop nothing")
        require(
            self.drop == "weight" or self.capacity_factor or self.eval_capacity_factor,
            f"dispatch.drop={self.drop} says what a capacity drops: set dispatch.capacity_factor",
        )
        require(
            self.buffer_factor is None or self.buffer_factor >= 1,
            f"dispatch.buffer_factor={self.buffer_factor} must be at least 1, since even a balanced routing fills 1, "
            "or None for room for every row",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. One may be -1: the devices that are left.

    Left at None, `expert` is gcd(num_experts, devices left) and `data` takes the rest.
    `cpu_devices`: how many virtual devices each process pretends to have where there is only a CPU.
    """

    data: int | None = None
    fsdp: int = 1
    expert: int | None = None
    context: int = 1
    tensor: int = 1
    cpu_devices: int = 1

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "expert", "context", "tensor")}
        for name, size in sizes.items():
            require(size is None or size == -1 or size >= 1, f"mesh.{name}={size} must be at least 1, or -1 (the rest)")
        rest = [name for name, size in sizes.items() if size == -1]
        require(len(rest) <= 1, f"only one mesh axis may be -1 (the rest of the devices), not {' and '.join(rest)}")
        require(self.context == 1, f"mesh.context={self.context}: sharding the sequence is not built yet; set it to 1")
        require(self.cpu_devices >= 1, f"mesh.cpu_devices={self.cpu_devices} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How rows become conversations, and those become ids (docs/chat_data.md); instruct tuning reads it.

    `template="auto"` is v3 where the tokenizer has its control tokens, else v1. `literal_inst`: what v1 does with a
    text that contains its own `[INST]`. `format="auto"` looks at each row. `long_rows`: what becomes of a conversation
    longer than `train.sequence_length`: its end is cut off, it is left out, or the run ends.
    """

    template: TemplateName = "auto"
    literal_inst: LiteralInst = "reject"
    format: ChatFormat = "auto"
    long_rows: Literal["cut", "drop", "error"] = "cut"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on. `path` and `tokenizer` take the forms listed in docs/data.md.

    `suffixes`, as `.py,.md`, are those of the files that are read of a folder or glob; files whose suffix is that of no
    form of rows are one text each. None: `.txt` and all forms of rows.

    `domain_field` of a row says what kind of text it is, for `analyze`; None: the place of its file does.

    `held_out_fraction` of the documents is never trained on; a run ends when more than
    `max_bad_fraction` of the rows cannot be read.
    """

    path: str = "python-stdlib"
    tokenizer: str = "train:4096"
    text_field: str = "text"
    suffixes: str | None = None
    domain_field: str | None = None
    held_out_fraction: float = 0.02
    max_bad_fraction: float = 0.01
    chat: ChatConfig = ChatConfig()

    def __post_init__(self):
        require(self.path, "data.path must name a file, a folder, a glob, hub:NAME, or python-stdlib")
        require(
            self.suffixes is None or all(re.fullmatch(r"\.\w+", suffix) for suffix in self.suffixes.split(",")),
            f"data.suffixes={self.suffixes} must be suffixes with their dots, as .py,.md",
        )
        require(
            0 < self.held_out_fraction < 1, f"data.held_out_fraction={self.held_out_fraction} must lie between 0 and 1"
        )
        require(
            0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction} must lie between 0 and 1"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; weight decay falls on matrices only.

    The schedule is in fractions of the run, so that `train.num_steps` alone shortens it.
    """

    learning_rate: float = 3e-4
    final_learning_rate_fraction: float = 0.1
    warmup_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self):
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        for name in ("final_learning_rate_fraction", "warmup_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("epsilon", "max_grad_norm"):
            require(getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)} must be positive")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length and the shape of a run.

    `batch_size`: sequences of `sequence_length` tokens per optimizer step over all devices, computed
    in `gradient_accumulation` equal micro-batches. `eval_every=None`: ten times a run.
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
        for name in ("num_steps", "batch_size", "gradient_accumulation", "log_every", "eval_sequences"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        require(self.sequence_length >= 2, f"train.sequence_length={self.sequence_length} must be at least 2")
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in [0, 2**32)")
        require(
            self.eval_every is None or self.eval_every >= 1,
            f"train.eval_every={self.eval_every} must be at least 1, or None for ten times a run",
        )
        require(
            self.batch_size % self.gradient_accumulation == 0,
            f"train.batch_size={self.batch_size} must be a multiple of "
            f"train.gradient_accumulation={self.gradient_accumulation}",
        )

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one micro-batch, over all devices."""
        return self.batch_size // self.gradient_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save (`every=None`: four times a run; the end is always saved) and how many to keep."""

    every: int | None = None
    keep: int = 2

    def __post_init__(self):
        require(self.every is None or self.every >= 1, f"checkpoint.every={self.every} must be at least 1, or None")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where figures go besides the console and metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: of pretraining, from a dense model with `upcycle`; or with `finetune` of tuning."""

    model: ModelConfig
    router: RouterConfig = RouterConfig()
    dispatch: DispatchConfig = DispatchConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    finetune: FinetuneConfig | None = None
    upcycle: UpcycleConfig | None = None
    log: LogConfig = LogConfig()

    def __post_init__(self):
        require(
            self.model.granularity == 1,
            f"model.granularity={self.model.granularity} is a shorthand, which config_mapping.build writes out: "
            "build the Config with it, or set num_experts, intermediate_size and num_experts_per_token themselves",
        )
        require(
            self.finetune is None or self.upcycle is None,
            "finetune and upcycle are two runs: train.py upcycles, and finetune_instruct.py tunes what comes of it",
        )
        if self.upcycle:
            self.upcycle.check(self.model, self.router)
        if self.finetune:
            require(
                not self.router.bias.update_rate,
                "finetune takes its base from a Mixtral, which has no balance bias: set router.bias.update_rate to 0",
            )
        self._check_choice()

    def _check_choice(self) -> None:
        """Raises ConfigError where what the router may choose does not fit the experts that there are."""
        router, experts = self.router, self.model.num_experts
        chosen, choice = router.num_experts_per_token, router.choice
        require(
            chosen <= experts,
            f"router.num_experts_per_token={chosen} must be at most model.num_experts={experts}",
        )
        require(
            choice != "dense" or chosen == experts,
            f"router.choice=dense sends each token to all of model.num_experts={experts}: with "
            f"router.num_experts_per_token={chosen}, set model.num_experts={chosen} for as much work a token",
        )
        in_reach = router.groups_per_token * experts // router.num_groups
        require(
            experts % router.num_groups == 0 and chosen <= in_reach,
            f"router.num_groups={router.num_groups} must divide model.num_experts={experts}, and leave a token, in "
            f"router.groups_per_token={router.groups_per_token} of them, at least {chosen} experts to choose",
        )
        factors = (self.dispatch.capacity_factor, self.dispatch.eval_capacity_factor)
        require(
            factors == (None, None) or choice not in ("expert_choice", "uniform", "dense"),
            f"router.choice={choice} decides by itself how much each expert gets: set dispatch.capacity_factor and "
            "dispatch.eval_capacity_factor to None",
        )
