"""Mixtral in JAX: a sparse mixture of experts, its experts sharded over a mesh of devices.

From Python: `load_config`, `train`, `tune` and `load_pretrained`; see docs/python.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.config import load_config as load_config
    from mixtral_jax.pretrained import Pretrained as Pretrained
    from mixtral_jax.pretrained import load_pretrained as load_pretrained
    from mixtral_jax.runs.python import RunResult as RunResult
    from mixtral_jax.runs.python import train as train
    from mixtral_jax.runs.python import tune as tune

__version__ = "0.1.0"

# Name -> the module that has it. Imported on first use: configs and help are read through this
# package, and should not wait for jax.
_MODULES = {
    "Pretrained": "mixtral_jax.pretrained",
    "RunResult": "mixtral_jax.runs.python",
    "load_config": "mixtral_jax.config",
    "load_pretrained": "mixtral_jax.pretrained",
    "train": "mixtral_jax.runs.python",
    "tune": "mixtral_jax.runs.python",
}
__all__ = ["Pretrained", "RunResult", "load_config", "load_pretrained", "train", "tune"]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
