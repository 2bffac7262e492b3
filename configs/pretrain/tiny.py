"""The first run: a tiny Mixtral trains on the Python standard library.

Its eight experts are sharded over eight devices, which are virtual on a CPU. The run takes a few
minutes on two cores.

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
