"""The first tuning: a tiny Mixtral learns to answer questions about the Python standard library.

It pretrains its own base on that library first, and takes minutes on two CPU cores.
--config.finetune.base=MODEL tunes another model instead. All weights are trained, because a tiny
base knows too little for small adapters to work with; --config.finetune.lora.rank=16 shows this.

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
