"""How tokens choose experts, and what keeps that choice even: the section `router` of a config.

Formulas and sources are in docs/routers.md and beside the code that computes them, in `model`.
"""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require

# Each name is a function of model/selection.py.
RouterChoice = Literal[
    "top_k",
    "group_limited",
    "sinkhorn",
    "expert_choice",
    "hash",
    "random",
    "uniform",
    "dense",
]
# Choices that do not ask the router, which therefore learns nothing.
BLIND_CHOICES: tuple[RouterChoice, ...] = ("hash", "random", "uniform", "dense")
# Choices whose load is nearly even whatever the router computes. The balance loss E sum_e f_e P_e
# with f_e = 1 / E is then 1, and has no gradient.
EVEN_CHOICES: tuple[RouterChoice, ...] = ("sinkhorn", "expert_choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadBalanceConfig:
    """The auxiliary loss that keeps routing even.

    Attributes:
        weight: what the loss is multiplied by; 0 turns it off.
        normalization: `switch` averages the loss over layers and is 1 at perfect balance (Switch
            Transformer, arXiv 2101.03961, eq. 4, with the load divided by k). `hf` is the value of
            transformers, which pools all layers and is k at perfect balance.
        scope: the tokens that should be balanced together: those of each `sequence` (a row of the
            batch), of a `micro` batch over all devices, or of all micro-batches of a step
            (`global`, arXiv 2501.11873). With several micro-batches, `global` costs one more
            forward pass, which counts.
    """

    weight: float = 0.01
    normalization: Literal["switch", "hf"] = "switch"
    scope: Literal["sequence", "micro", "global"] = "micro"

    def __post_init__(self):
        require(self.weight >= 0, f"router.load_balance.weight={self.weight} must not be negative")
        require(
            self.scope != "sequence" or self.normalization == "switch",
            "router.load_balance.scope=sequence needs normalization=switch: hf pools all tokens by "
            "definition",
        )
        require(
            self.scope != "global" or self.weight,
            "router.load_balance.scope=global counts routes in a forward pass of its own, which is "
            "wasted with weight=0: use micro",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceBiasConfig:
    """Balance without a loss (arXiv 2408.15664): a bias per expert that is added to the scores.

    Attributes:
        update_rate: how far a bias moves after each step, towards even load; 0 turns it off.
        is_zero_mean: subtracts the mean over experts from the biases after each step.
        decay_fraction: the last share of the run, over which the rate falls to 0 linearly.
    """

    update_rate: float = 0.0
    is_zero_mean: bool = False
    decay_fraction: float = 0.0

    def __post_init__(self):
        require(
            self.update_rate >= 0,
            f"router.bias.update_rate={self.update_rate} must not be negative",
        )
        require(
            0 <= self.decay_fraction <= 1,
            f"router.bias.decay_fraction={self.decay_fraction} must lie between 0 and 1",
        )
        require(
            self.update_rate or not (self.is_zero_mean or self.decay_fraction),
            "router.bias.is_zero_mean and decay_fraction need a bias: set router.bias.update_rate "
            "(paper: 0.001)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise in training on what the router reads or computes; 0 turns each kind off.

    Attributes:
        jitter: multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch Transformer,
            arXiv 2101.03961, section 2.2: 0.01).
        noisy_top_k: adds noisy_top_k * N(0, 1) / E to the logits (V-MoE, arXiv 2106.05974: 1.0).
        gumbel: adds gumbel * Gumbel(0, 1) to the logits. With 1, the chosen experts are a sample
            without replacement from the softmax.
    """

    jitter: float = 0.0
    noisy_top_k: float = 0.0
    gumbel: float = 0.0

    def __post_init__(self):
        require(0 <= self.jitter < 1, f"router.noise.jitter={self.jitter} must lie in [0, 1)")
        for name in ("noisy_top_k", "gumbel"):
            require(
                getattr(self, name) >= 0,
                f"router.noise.{name}={getattr(self, name)} must not be negative",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts, and the losses on that choice.

    Attributes:
        num_experts_per_token: how many experts a token visits, the k of top-k.
        choice: how tokens and experts are matched: a function of model/selection.py.
        score: how logits become weights. `softmax_chosen` is the softmax over the chosen experts
            (Mixtral), `softmax` that over all experts, and `sigmoid` scores each expert alone.
        renormalize: divides the weights of `softmax` and `sigmoid` by their sum over the chosen.
        scale: multiplies all weights.
        num_groups: equal groups of experts, for the choice `group_limited`.
        groups_per_token: how many of these groups a token may visit.
        load_balance: the auxiliary balance loss.
        sequence_loss_weight: weight of DeepSeek-V3's balance loss within each sequence (arXiv
            2412.19437, eq. 17), in addition to the other means of balance.
        z_loss_weight: weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5).
        bias: balance by a bias per expert.
        noise: noise in training.
        dtype: the dtype of the matmul that computes the logits.
        init_scale: the router's first weights have init_scale * model.initializer_range as their
            standard deviation.
        learning_rate_factor: multiplies the router's learning rate; 0 freezes the router.
        expert_dropout: share of each expert's hidden units that a micro-batch goes without.
    """

    num_experts_per_token: int = 2
    choice: RouterChoice = "top_k"
    score: Literal["softmax_chosen", "softmax", "sigmoid"] = "softmax_chosen"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    load_balance: LoadBalanceConfig = LoadBalanceConfig()
    sequence_loss_weight: float = 0.0
    z_loss_weight: float = 0.001
    bias: BalanceBiasConfig = BalanceBiasConfig()
    noise: NoiseConfig = NoiseConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    init_scale: float = 1.0
    learning_rate_factor: float = 1.0
    expert_dropout: float = 0.0

    def __post_init__(self):
        for name in ("num_experts_per_token", "num_groups", "groups_per_token"):
            require(
                getattr(self, name) >= 1, f"router.{name}={getattr(self, name)} must be at least 1"
            )
        for name in ("z_loss_weight", "sequence_loss_weight"):
            require(
                getattr(self, name) >= 0,
                f"router.{name}={getattr(self, name)} must not be negative",
            )
        require(
            self.init_scale > 0,
            f"router.init_scale={self.init_scale} must be positive: equal logits send all tokens "
            "to the same experts",
        )
        factor = self.learning_rate_factor
        require(
            factor >= 0, f"router.learning_rate_factor={factor} must not be negative (0: frozen)"
        )
        require(self.scale > 0, f"router.scale={self.scale} must be positive")
        require(
            0 <= self.expert_dropout < 1,
            f"router.expert_dropout={self.expert_dropout} must lie in [0, 1)",
        )
        self._check_weights()
        self._check_groups()
        self._check_balance()

    def _check_weights(self) -> None:
        require(
            self.renormalize or self.score != "softmax_chosen",
            "router.renormalize=False changes nothing with score=softmax_chosen, whose weights sum "
            "to 1: use score=softmax",
        )
        require(
            self.choice != "expert_choice" or not self.renormalize,
            "router.choice=expert_choice may leave a token without an expert, whose weights have "
            "no sum to divide by: set router.renormalize=False and router.score=softmax",
        )

    def _check_groups(self) -> None:
        is_grouped = self.choice == "group_limited"
        require(
            is_grouped == (self.num_groups > 1),
            f"router.num_groups={self.num_groups} and router.choice={self.choice} do not go "
            "together: only group_limited has several groups, as with router.num_groups=4, "
            "router.groups_per_token=2",
        )
        require(
            self.groups_per_token < self.num_groups or not is_grouped,
            f"router.groups_per_token={self.groups_per_token} must be under "
            f"router.num_groups={self.num_groups}: tokens that may visit all groups choose as with "
            "router.choice=top_k",
        )

    def _check_balance(self) -> None:
        """Refuses settings that would have no effect or would undo each other."""
        if self.choice in BLIND_CHOICES:
            self._check_blind_choice()
        require(
            self.load_balance.scope != "sequence" or not self.sequence_loss_weight,
            "router.load_balance.scope=sequence and router.sequence_loss_weight are one loss: add "
            "the weights up",
        )
        require(
            self.choice not in EVEN_CHOICES
            or not (self.load_balance.weight or self.sequence_loss_weight),
            f"router.choice={self.choice} evens the load by itself, and leaves a balance loss "
            "nothing to act on: set router.load_balance.weight and router.sequence_loss_weight to "
            "0",
        )
        require(
            not self.bias.update_rate or self.choice in ("top_k", "group_limited"),
            "router.bias moves the choices top_k and group_limited, and "
            f"router.choice={self.choice} does not add it: set router.bias.update_rate to 0",
        )

    def _check_blind_choice(self) -> None:
        settings = {
            "load_balance.weight": self.load_balance.weight,
            "sequence_loss_weight": self.sequence_loss_weight,
            "z_loss_weight": self.z_loss_weight,
            **{f"noise.{name}": value for name, value in dataclasses.asdict(self.noise).items()},
        }
        useless = [f"router.{name}={value}" for name, value in settings.items() if value]
        require(
            not useless,
            f"router.choice={self.choice} does not ask the router, so these have nothing to act "
            f"on: set {', '.join(useless)} to 0",
        )
        require(
            self.score == "softmax_chosen",
            f"router.choice={self.choice} weighs all experts alike, so leave out "
            f"router.score={self.score}",
        )
        require(
            self.learning_rate_factor == 1,
            f"router.choice={self.choice} does not ask the router, which learns nothing: leave out "
            f"router.learning_rate_factor={self.learning_rate_factor}",
        )
