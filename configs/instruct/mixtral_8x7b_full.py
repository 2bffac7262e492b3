"""Every weight of Mixtral 8x7B, on 8 GPUs with the memory of an H200, 16 with that of an H100, or
16 chips of TPU v5p.

Weights and AdamW's moments in float32, cut over all devices: 523 GiB. 16 rows of 8,192 tokens a
step. Planned, never run on that hardware: `mixtral-jax plan` finds a peak of 49 GiB a chip on
v5p:2x2x4 (95 GiB), and at most 3,900 tokens/s; it estimates 112 GiB a GPU on h200:8 (131 GiB) and
58 GiB on h100:16 (75 GiB), of a program for CPUs, whose arrays are wider. The learning rate is not
tried. Name the base, your conversations, and a workdir that every host sees; run on every host:

    python finetune_instruct.py --config=configs/instruct/mixtral_8x7b_full.py
    --config.finetune.base=BASE \
        --config.data.path=CHATS --workdir=DIR
"""

from ml_collections import ConfigDict

from configs.instruct import mixtral_8x7b_lora


def get_config() -> ConfigDict:
    config = mixtral_8x7b_lora.get_config()
    config.update(
        {"mesh": {"fsdp": -1}, "optimizer": {"learning_rate": 1e-5}, "train": {"batch_size": 16}}
    )
    config.finetune = {"base": "BASE", "lora": {"rank": 0}}
    return config
