"""Should tokens choose experts, or experts choose tokens?

Expert choice is even by construction, but not causal: its training loss sees later tokens. Compare
held-out losses instead, which are measured with top-k; expect it to lose there. `sinkhorn` evens
out the choices of tokens. The arms `hash`, `random` and `dense` do not use a router at all and
serve as controls. This takes about twenty minutes.

    python -m mixtral_jax ablate --config=configs/ablations/expert_choice.py --workdir=ABLATION
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()

    def choice(name: str, **keys: object) -> dict[str, object]:
        return {"router.choice": name, "router.load_balance.weight": 0.0, **keys}

    by_expert = choice("expert_choice", **{"router.score": "softmax", "router.renormalize": False})
    arms = {
        "token-choice": {},
        "expert-choice": by_expert,
        "dense": choice("dense", **{"model.num_experts": 2}),
    }
    arms |= {name: choice(name) for name in ("sinkhorn", "hash", "random")}
    question = "Should tokens choose experts, or experts tokens?"
    return {**ablation, "question": question, "arms": arms, "reference": "token-choice"}
