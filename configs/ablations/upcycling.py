"""Is it better to make a mixture from a trained dense model than to train it from scratch?

Each upcycled run first pretrains its dense model, in its own folder, for 400 steps
(--config.upcycle.pretrain.num_steps); the loss against tokens does not count these. Expect `copy`
to start low and its experts to stay alike; noise and redrawn units let them become different. This
takes about fifteen minutes.

    python -m mixtral_jax ablate --config=configs/ablations/upcycling.py --workdir=ABLATION
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
        "question": "Is a mixture made from a trained dense model better than one from scratch?",
        "arms": arms,
        "reference": "scratch",
    }
