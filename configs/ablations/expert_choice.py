"""Should tokens choose experts, or experts tokens? And how far do choices get that do not ask at
all?

Expert choice is even by construction and not causal: its training loss sees later tokens, so
compare the held-out ones, which are measured with top-k. Expect it to lose there; hash, random and
dense are controls. About twenty minutes.

    python -m mixtral_jax ablate --config=configs/ablations/expert_choice.py --workdir=DIR
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
