"""Does a balance loss keep routing even, and what does it cost?

The arms have no balance loss, the usual weight of 1e-2, a tenth of it, and ten times as much. The
model is the tiny one with two layers, on one device. Runs of 0.8 million tokens are long enough for
a router without a balance loss to settle on a few experts. The z-loss is off, so that nothing else
acts on the router. The 12 runs take about ten minutes on two idle cores.

    python -m mixtral_jax ablate --config=configs/ablations/balance.py --workdir=ABLATION
"""

from typing import Any

from configs.pretrain import tiny


def get_config() -> dict[str, Any]:
    base = tiny.get_config()
    base.update(model={"num_layers": 2, "vocab_size": 1024}, data={"tokenizer": "train:1024"})
    base.update(mesh={"cpu_devices": 1}, train={"batch_size": 8, "log_every": 5})
    base.update(router={"z_loss_weight": 0.0}, checkpoint={"keep": 5})
    weight = "router.load_balance.weight"
    return {
        "question": "Does a balance loss keep routing even, and what does it cost?",
        "base": base,
        "arms": {
            "none": {weight: 0.0},
            "1e-3": {weight: 1e-3},
            "1e-2": {weight: 1e-2},
            "1e-1": {weight: 1e-1},
        },
        "reference": "1e-2",
        "seeds": (0, 1, 2),
        "tokens": 800_000,
    }
