"""Settings of the router that make no sense together are refused, with the reason and the fix."""

import pytest

from mixtral_jax.config import ConfigError
from tests.model.routed_layer import BIAS, EXPERT_CHOICE, GROUPS, NO_LOSS, SINKHORN, config_of


@pytest.mark.parametrize(
    ("options", "others", "words"),
    [
        ({"choice": "top-k"}, {}, ["router.choice='top-k'", "'top_k'", "'expert_choice'"]),
        ({"renormalize": False}, {}, ["changes nothing", "score=softmax"]),
        ({"choice": "expert_choice"}, {}, ["no sum to divide by", "renormalize=False"]),
        ({**EXPERT_CHOICE, "load_balance__weight": 0.01}, {}, ["evens the load by itself", "to 0"]),
        ({"choice": "sinkhorn"}, {}, ["evens the load by itself", "router.load_balance.weight"]),
        (
            {**SINKHORN, "sequence_loss_weight": 0.1},
            {},
            ["evens the load by itself", "router.sequence_loss_weight"],
        ),
        ({**EXPERT_CHOICE, **BIAS}, {}, ["router.bias"]),
        (
            EXPERT_CHOICE,
            {"dispatch__capacity_factor": 1.0},
            ["how many tokens each expert gets", "None"],
        ),
        (
            {"choice": "dense", **NO_LOSS, "num_experts_per_token": 8},
            {"dispatch__eval_capacity_factor": 4.0},
            ["to None"],
        ),
        ({"choice": "hash", **NO_LOSS, "score": "sigmoid"}, {}, ["weighs all experts alike"]),
        ({"load_balance__scope": "global", "load_balance__weight": 0}, {}, ["use micro"]),
        (
            {"load_balance__scope": "sequence", "sequence_loss_weight": 0.1},
            {},
            ["add the weights up"],
        ),
        ({"init_scale": 0}, {}, ["must be positive"]),
        (BIAS, {"finetune": {}}, ["router.bias.update_rate"]),
        (
            {"choice": "hash"},
            {},
            ["router.load_balance.weight=0.01", "router.z_loss_weight=0.001", "to 0"],
        ),
        ({"choice": "hash", **NO_LOSS, "noise__gumbel": 1}, {}, ["router.noise.gumbel=1.0"]),
        ({"choice": "dense", **NO_LOSS}, {}, ["set model.num_experts=2"]),
        ({"num_groups": 4}, {}, ["group_limited"]),
        ({"choice": "group_limited"}, {}, ["router.num_groups=1"]),
        ({**GROUPS, "num_groups": 3}, {}, ["must divide model.num_experts=8"]),
        ({**GROUPS, "groups_per_token": 5}, {}, ["under router.num_groups=4"]),
        ({**GROUPS, "groups_per_token": 1, "num_experts_per_token": 3}, {}, ["at least 3 experts"]),
        ({"bias__is_zero_mean": True}, {}, ["router.bias.update_rate"]),
        (
            {"load_balance__scope": "sequence", "load_balance__normalization": "hf"},
            {},
            ["pools all tokens"],
        ),
        ({}, {"dispatch__drop": "position"}, ["set dispatch.capacity_factor"]),
        ({"noise__jitter": 1}, {}, ["[0, 1)"]),
    ],
)
def test_senseless_settings_are_refused_with_the_reason(
    options: dict, others: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(options, **others)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
