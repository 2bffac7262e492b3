"""draft

python finetune_instruct.py --config=configs/instruct/mixtral_8x7b_full.py
"""

from ml_collections import ConfigDict

from configs.instruct import mixtral_8x7b_lora


def get_config() -> ConfigDict:
    config = mixtral_8x7b_lora.get_config()
    config.update({"mesh": {"fsdp": -1}, "optimizer": {"learning_rate": 1e-5}, "train": {"batch_size": 16}})
    config.finetune = {"lora": {"rank": 0}}
    return config
