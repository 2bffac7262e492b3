"""The smallest shape of `bench --growth`, which makes it larger in one direction at a time.

2 layers of 8 experts, top-2, float32, 512 tokens a step. Most of the time is for compiling.

    python -m mixtral_jax bench --growth --config=configs/bench/growth.py
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    model = models.tiny()
    model.update(num_layers=2)
    return ConfigDict(
        {
            "model": model,
            "train": {"num_steps": 1, "batch_size": 8, "sequence_length": 64},
            "mesh": {"cpu_devices": 8},
        }
    )
