"""The first tuning: a tiny Mixtral, pretrained on the Python library for the occasion, learns to
answer about it.

Minutes on two CPU cores, most of them for the base. All weights are trained: a tiny base knows too
little for small adapters to bring out, which --config.finetune.lora.rank=16 shows;
--config.finetune.base=DIR tunes another model.

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
