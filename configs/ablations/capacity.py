"""What does it cost to drop the routes that are over an expert's capacity?

Evaluated without drops (a factor of 4 holds everything that top-2 of 8 can send), so that the
held-out losses compare what was learned. Expect drops to fall as the balance loss takes hold. About
ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/capacity.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    factor, evaluated = "dispatch.capacity_factor", {"dispatch.eval_capacity_factor": 4.0}
    arms = {
        "dropless": {},
        **{str(c): {factor: c, **evaluated} for c in (2.0, 1.25, 1.0)},
    }
    return {
        **ablation,
        "question": "What does a capacity cost that drops routes in training?",
        "arms": arms,
        "reference": "dropless",
    }
