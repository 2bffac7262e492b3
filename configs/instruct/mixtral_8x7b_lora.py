"""draft

python finetune_instruct.py --config=configs/instruct/mixtral_8x7b_lora.py --config.finetune.base=DIR
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": models.mixtral_8x7b(),
            "router": {"load_balance": {"weight": 0.02, "normalization": "hf"}, "z_loss_weight": 0.0},
            "mesh": {"fsdp": 4, "expert": 2},
            "data": {"path": "TEXT", "tokenizer": "mixtral"},
            "optimizer": {"learning_rate": 1e-4},
            "finetune": {"frozen_dtype": "bfloat16", "lora": {"rank": 16}},
            "train": {"num_steps": 300, "batch_size": 8, "sequence_length": 8192},
        }
    )
