"""Adapters on the attention and the experts of Mixtral 8x7B, on 8 chips: one host of TPU v6e, or
two of v5p.

The base stays in bfloat16; 240,123,904 parameters learn. 8 rows of 8,192 tokens a step, one a chip,
which holds one expert of each layer, and room for every row that may come to it: none is ever lost.
Planned, never run on that hardware: `mixtral-jax plan` finds a peak of 17.0 GiB a chip on v6e:2x4
(29.8 GiB) and on v5p:2x2x2 (95 GiB), and at most 7,200 and 4,900 tokens/s a chip. The learning rate
is mistral-finetune's. Name the base, your conversations, and a workdir that every host sees; run on
every host:

    python finetune_instruct.py --config=configs/instruct/mixtral_8x7b_lora.py
    --config.finetune.base=BASE \
        --config.data.path=CHATS --workdir=DIR
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": models.mixtral_8x7b(),
            "router": {
                "load_balance": {"weight": 0.02, "normalization": "hf"},
                "z_loss_weight": 0.0,
            },
            "mesh": {"fsdp": 1, "expert": 8},
            "data": {"path": "CHATS", "tokenizer": "mixtral"},
            "optimizer": {"learning_rate": 1e-4},
            "finetune": {"base": "BASE", "frozen_dtype": "bfloat16", "lora": {"rank": 16}},
            "train": {"num_steps": 300, "batch_size": 8, "sequence_length": 8192},
        }
    )
