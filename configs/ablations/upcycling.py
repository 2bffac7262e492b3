"""Is a mixture better made of a trained dense model than from scratch?

Each upcycled run pretrains its dense base first, into its own folder: 400 steps
(--config.upcycle.pretrain.num_steps), which the loss against tokens does not count. Expect copies
to start low and stay alike; noise and redrawn units let them part. About fifteen minutes.

    python -m mixtral_jax ablate --config=configs/ablations/upcycling.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    method = "upcycle.method"
    arms = {
        "scratch": {},
        "copy": {method: "copy"},
        "noise": {method: "noise"},
        "drop": {method: "drop"},
    }
    return {
        **ablation,
        "question": "Is a mixture better made of a trained dense model than from scratch?",
        "arms": arms,
        "reference": "scratch",
    }
