"""What does it cost to drop routes that exceed the capacity of an expert?

Evaluation drops nothing, so that held-out losses compare what was learned: an evaluation capacity
factor of 4 holds everything that top-2 of 8 experts can send. Expect fewer drops as the balance
loss takes effect. This takes about ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/capacity.py --workdir=ABLATION
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
        "question": "What does it cost to drop routes over capacity in training?",
        "arms": arms,
        "reference": "dropless",
    }
