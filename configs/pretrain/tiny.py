"""The first run: a tiny Mixtral, eight experts over eight devices, on the Python standard library.

On a CPU the devices are virtual. Takes about five minutes on two cores.

    python train.py
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": models.tiny(),
            "mesh": {"cpu_devices": 8},
            "data": {"path": "python-stdlib", "tokenizer": "train:2048"},
            "optimizer": {"learning_rate": 4e-3},
            "train": {"num_steps": 400, "batch_size": 16, "sequence_length": 128},
        }
    )
