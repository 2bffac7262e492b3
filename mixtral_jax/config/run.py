"""The config of a whole run: all sections, and the rules that hold between them."""

import dataclasses
import operator
from collections.abc import Iterator

from mixtral_jax.config.data import ChatConfig, DataConfig
from mixtral_jax.config.dispatch import DispatchConfig
from mixtral_jax.config.errors import require
from mixtral_jax.config.finetune import FinetuneConfig
from mixtral_jax.config.mesh import MeshConfig
from mixtral_jax.config.model import ModelConfig
from mixtral_jax.config.router import RouterConfig
from mixtral_jax.config.train import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from mixtral_jax.config.upcycle import UpcycleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The config of a whole run.

    It is a pretraining run by default, a pretraining run that starts from a dense model with
    `upcycle`, and a tuning run with `finetune`.
    """

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
            f"model.granularity={self.model.granularity} is a shorthand for config.build: "
            "make the Config with config.build, or set num_experts, intermediate_size and "
            "num_experts_per_token instead",
        )
        require(
            self.finetune is None or self.upcycle is None,
            "finetune and upcycle are two runs: upcycle with train.py, then tune its result "
            "with finetune_instruct.py",
        )
        if self.upcycle:
            self.upcycle.check(self.model, self.router)
        if self.finetune:
            require(
                not self.router.bias.update_rate,
                "the base of finetune is a Mixtral, which has no balance bias: set "
                "router.bias.update_rate to 0",
            )
        self._check_choice()
        for key, reason in self._find_void():
            value, (section, _, name) = operator.attrgetter(key)(self), key.rpartition(".")
            default = getattr(type(operator.attrgetter(section)(self)), name)
            require(
                value == default,
                f"{key}={value} has no effect, since {reason}: leave it out, or set it to "
                f"{default}",
            )

    def _find_void(self) -> Iterator[tuple[str, str]]:
        """The keys that other settings make void, and why.

        They are refused here, not in their sections, which are also read of runs that have ended.
        """
        if self.data.held_out is not None:
            yield "data.held_out_fraction", "data.held_out is held out, and nothing is drawn"
        if self.finetune is None:
            for field in dataclasses.fields(ChatConfig):
                yield f"data.chat.{field.name}", "a run without a section finetune reads texts"
        elif self.finetune.base is not None:
            yield "data.text_field", "a tuning reads conversations (data.chat.fields)"
        if self.finetune and not self.finetune.lora.rank:
            for name in ("alpha", "targets"):
                yield f"finetune.lora.{name}", "finetune.lora.rank=0 trains the whole model"
        if self.upcycle:
            used = {"noise": "noise_std", "drop": "drop_fraction"}
            for method, name in used.items():
                if method != self.upcycle.method:
                    yield f"upcycle.{name}", f"upcycle.method={self.upcycle.method}"
        if self.optimizer.name == "adafactor":
            for name in ("beta1", "beta2", "epsilon", "first_moment_dtype"):
                yield f"optimizer.{name}", "optimizer.name=adafactor has no use for it"

    def _check_choice(self) -> None:
        """Checks that the number of experts fits what the router chooses."""
        router, experts = self.router, self.model.num_experts
        chosen, choice = router.num_experts_per_token, router.choice
        require(
            chosen <= experts,
            f"router.num_experts_per_token={chosen} must be at most model.num_experts={experts}",
        )
        require(
            choice != "dense" or chosen == experts,
            f"router.choice=dense sends each token to all of model.num_experts={experts}: with "
            f"router.num_experts_per_token={chosen}, set model.num_experts={chosen} for the same "
            "work per token",
        )
        in_reach = router.groups_per_token * experts // router.num_groups
        require(
            experts % router.num_groups == 0 and chosen <= in_reach,
            f"router.num_groups={router.num_groups} must divide model.num_experts={experts}, and "
            f"router.groups_per_token={router.groups_per_token} of the groups must have at least "
            f"{chosen} experts to choose from",
        )
        factors = (self.dispatch.capacity_factor, self.dispatch.eval_capacity_factor)
        require(
            factors == (None, None) or choice not in ("expert_choice", "uniform", "dense"),
            f"router.choice={choice} decides by itself how many tokens each expert gets: set "
            "dispatch.capacity_factor and dispatch.eval_capacity_factor to None",
        )
