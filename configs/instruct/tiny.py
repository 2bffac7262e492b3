"""The first tuning: a tiny base, then answers about the Python library.

draft

    python finetune_instruct.py
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": models.tiny(),
            "mesh": {"cpu_devices": 8},
            "data": {"path": "python-stdlib-chat", "tokenizer": "train:2048"},
            "optimizer": {"learning_rate": 2e-3},
            "finetune": {"lora": {"rank": 0}},
            "train": {"num_steps": 400, "batch_size": 16, "sequence_length": 256},
        }
    )
