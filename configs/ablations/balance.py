"""Does a balance loss keep routing even, and what does it cost?

python -m mixtral_jax ablate --config=configs/ablations/balance.py --workdir=DIR
"""

from typing import Any

from configs.pretrain import tiny


def get_config() -> dict[str, Any]:
    base = tiny.get_config()
    base.model.update(num_layers=2, vocab_size=1024)
    base.data.tokenizer = "train:1024"
    base.mesh.cpu_devices = 1
    base.train.update(batch_size=8, log_every=5)
    base.router = {"z_loss_weight": 0.0}
    weight = "router.load_balance.weight"
    return {
        "question": "Does a balance loss keep routing even, and what does it cost?",
        "base": base,
        "arms": {"none": {weight: 0.0}, "1e-3": {weight: 1e-3}, "1e-2": {weight: 1e-2}, "1e-1": {weight: 1e-1}},
        "reference": "1e-2",
        "seeds": (0, 1, 2),
        "tokens": 800_000,
    }
