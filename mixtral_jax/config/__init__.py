"""Every setting of a run, as frozen and validated dataclasses: import them from here.

Knows no jax, so that reading or checking a config starts no back end. What depends on the devices
(does the mesh fit them?) is checked by `parallel.mesh`, what depends on the data by `data`.
`mapping` makes a `Config` of nested mappings, `files` reads those from config files.
"""

from mixtral_jax.config.data import (
    ChatConfig,
    ChatFormat,
    DataConfig,
    FieldMeaning,
    LiteralInst,
    TemplateName,
    parse_fields,
)
from mixtral_jax.config.dispatch import DispatchConfig, GroupedMatmulName, TransportName
from mixtral_jax.config.errors import ConfigError, require
from mixtral_jax.config.files import SHIPPED, load_config, load_config_file, run_config_file
from mixtral_jax.config.finetune import FinetuneConfig, LoRAConfig, PretrainConfig
from mixtral_jax.config.mapping import RESUMABLE_KEYS, build, changed_keys, set_key
from mixtral_jax.config.mesh import MeshConfig
from mixtral_jax.config.model import AttentionName, ModelConfig, RematName
from mixtral_jax.config.paths import find_path_problem, local_path, names_existing
from mixtral_jax.config.router import (
    BLIND_CHOICES,
    EVEN_CHOICES,
    BalanceBiasConfig,
    LoadBalanceConfig,
    NoiseConfig,
    RouterChoice,
    RouterConfig,
)
from mixtral_jax.config.run import Config
from mixtral_jax.config.train import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    OptimizerName,
    TrainConfig,
)
from mixtral_jax.config.upcycle import UpcycleConfig

__all__ = [
    "BLIND_CHOICES",
    "EVEN_CHOICES",
    "RESUMABLE_KEYS",
    "SHIPPED",
    "AttentionName",
    "BalanceBiasConfig",
    "ChatConfig",
    "ChatFormat",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DispatchConfig",
    "FieldMeaning",
    "FinetuneConfig",
    "GroupedMatmulName",
    "LiteralInst",
    "LoRAConfig",
    "LoadBalanceConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "OptimizerName",
    "PretrainConfig",
    "RematName",
    "RouterChoice",
    "RouterConfig",
    "TemplateName",
    "TrainConfig",
    "TransportName",
    "UpcycleConfig",
    "build",
    "changed_keys",
    "find_path_problem",
    "load_config",
    "load_config_file",
    "local_path",
    "names_existing",
    "parse_fields",
    "require",
    "run_config_file",
    "set_key",
]
