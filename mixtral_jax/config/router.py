"""How tokens choose experts, and what keeps that choice even: the section `router` of a config.

Formulas and sources are in docs/routers.md and beside the code that computes them, in `model`.
"""

import dataclasses
from typing import Literal

from mixtral_jax.config.errors import require

# Name of a choice -> the function in model/choices.py that makes it. A line here registers a new
# one.
CHOICES = {
    "top_k": "choose_top_k",
    "group_limited": "choose_within_groups",
    "sinkhorn": "choose_by_sinkhorn",
    "expert_choice": "choose_tokens",
    "hash": "choose_by_hash",
    "random": "choose_at_random",
    "uniform": "choose_in_turn",
    "dense": "choose_all",
}
# Those that do not ask the router: nothing learns which expert is good for what.
BLIND_CHOICES = ("hash", "random", "uniform", "dense")
# Those whose load is nearly even whatever the router says. E sum_e f_e P_e with f_e = 1 / E is 1,
# without a gradient.
EVEN_CHOICES = ("sinkhorn", "expert_choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadBalanceConfig:
    """The auxiliary loss that keeps routing even.

    `normalization="switch"` is the loss of each layer, averaged, 1 at perfect balance (Switch
    Transformer eq. 4 with the load divided by k); `"hf"` is transformers' value, pooled over the
    layers, k at perfect balance. `scope` is the set of tokens that should be balanced: those of
    each sequence (a row of the batch), of a micro-batch over every device, or of all micro-batches
    of a step (`global`; with more than one, costs a forward pass that counts before the one that
    learns; arXiv 2501.11873).
    """

    weight: float = 0.01
    normalization: Literal["switch", "hf"] = "switch"
    scope: Literal["sequence", "micro", "global"] = "micro"

    def __post_init__(self):
        require(self.weight >= 0, f"router.load_balance.weight={self.weight} must not be negative")
        require(
            self.scope != "sequence" or self.normalization == "switch",
            "router.load_balance.scope=sequence goes with normalization=switch: hf pools all "
            "tokens by definition",
        )
        require(
            self.scope != "global" or self.weight,
            "router.load_balance.scope=global counts in a forward pass, for nothing with weight=0: "
            "use micro",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceBiasConfig:
    """Balance without a loss (arXiv 2408.15664): a bias for each expert, added to the scores that
    choose.

    After each step it moves by `update_rate` towards the mean load; 0 has no bias. `is_zero_mean`
    takes the mean over experts off it; over the last `decay_fraction` of the run the rate falls to
    0, in a straight line.
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
    """Noise on what the router sees or says, in training alone; 0 is none.

    `jitter`: its input times U(1 - jitter, 1 + jitter) (Switch Transformer, 0.01). `noisy_top_k`:
    that times N(0, 1) / E on the logits (V-MoE, arXiv 2106.05974, 1.0). `gumbel`: that times
    Gumbel(0, 1) on the logits: with 1, the chosen are a sample without replacement from the
    softmax.
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

    `choice`: see model/choices.py. `score` makes weights of logits: `softmax_chosen`, softmax over
    the chosen (Mixtral); `softmax`, over all experts; `sigmoid`, each expert by itself.
    `renormalize` divides the weights of the last two by their sum; `scale` multiplies all. Groups
    are for `group_limited`. `sequence_loss_weight` is of DeepSeek-V3's loss within each sequence,
    beside whatever else balances. `dtype` is that of the logits' matmul; `init_scale` is times
    model.initializer_range; the router learns at `learning_rate_factor` times the learning rate (0:
    it is frozen); `expert_dropout` is the share of each expert's hidden units that a micro-batch
    goes without.
    """

    num_experts_per_token: int = 2
    choice: str = "top_k"
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
        require(
            self.choice in CHOICES,
            f"router.choice={self.choice!r} must be one of {', '.join(map(repr, CHOICES))}",
        )
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
            "router.renormalize=False changes nothing with score=softmax_chosen, which sums to 1: "
            "use score=softmax",
        )
        require(
            self.choice != "expert_choice" or not self.renormalize,
            "router.choice=expert_choice may leave a token without an expert, whose weights have "
            "no sum to divide by: "
            "set router.renormalize=False and router.score=softmax",
        )

    def _check_groups(self) -> None:
        is_grouped = self.choice == "group_limited"
        require(
            is_grouped == (self.num_groups > 1),
            f"router.num_groups={self.num_groups} and router.choice={self.choice} do not go "
            "together: "
            "group_limited, and it alone, has several groups, as with router.num_groups=4, "
            "router.groups_per_token=2",
        )
        require(
            self.groups_per_token < self.num_groups or not is_grouped,
            f"router.groups_per_token={self.groups_per_token} must be under "
            f"router.num_groups={self.num_groups}: "
            "tokens that may visit all groups choose as with router.choice=top_k",
        )

    def _check_balance(self) -> None:
        """Refuses what would do nothing, or undo something."""
        weights = {
            "load_balance.weight": self.load_balance.weight,
            "sequence_loss_weight": self.sequence_loss_weight,
            "z_loss_weight": self.z_loss_weight,
            **{
                f"noise.{field.name}": getattr(self.noise, field.name)
                for field in dataclasses.fields(self.noise)
            },
        }
        useless = [f"router.{name}={value}" for name, value in weights.items() if value]
        require(
            self.choice not in BLIND_CHOICES or not useless,
            f"router.choice={self.choice} does not ask the router, so these have nothing to act "
            "on: set "
            f"{', '.join(useless)} to 0",
        )
        require(
            self.choice not in BLIND_CHOICES or self.score == "softmax_chosen",
            f"router.choice={self.choice} weighs all experts alike, so leave out "
            f"router.score={self.score}",
        )
        require(
            self.choice not in BLIND_CHOICES or self.learning_rate_factor == 1,
            f"router.choice={self.choice} does not ask the router, which learns nothing: leave out "
            f"router.learning_rate_factor={self.learning_rate_factor}",
        )
        require(
            self.load_balance.scope != "sequence" or not self.sequence_loss_weight,
            "router.load_balance.scope=sequence and router.sequence_loss_weight are one loss: add "
            "the weights up",
        )
        require(
            self.choice not in EVEN_CHOICES
            or not (self.load_balance.weight or self.sequence_loss_weight),
            f"router.choice={self.choice} evens the load by itself, and leaves a balance loss "
            "nothing to act on: set "
            "router.load_balance.weight and router.sequence_loss_weight to 0",
        )
        require(
            not self.bias.update_rate or self.choice in ("top_k", "group_limited"),
            "router.bias moves the choices top_k and group_limited, and "
            f"router.choice={self.choice} does not add it: "
            "set router.bias.update_rate to 0",
        )
