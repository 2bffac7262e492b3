"""A model from a folder, ready to be asked: `load_pretrained` and what it returns.

Composes rooms below it: `checkpoint` reads the weights, `data.tokenizer` the tokenizer, `parallel` lays both out.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.checkpoint.huggingface import load_weights, read_config
from mixtral_jax.config import Config, MeshConfig, TrainConfig, require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.model.balance import load_balance_loss
from mixtral_jax.model.transformer import ModelOutput, Transformer, model_maker, resolve_dispatch
from mixtral_jax.parallel.mesh import MESH_AXES, make_mesh, matmul_precision, resolve_mesh

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on its mesh, with what it needs to be asked something.

    Attributes:
        config: what the model was built with, nothing left to `auto`; its mesh is that of `mesh`.
        tokenizer: None where the folder has none.
    """

    config: Config
    model: Transformer
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh

    def logits(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
        """Next-token logits of int [B, T] tokens, float32 [B, T, V]; meaningless where the mask is 0.

        Rows of padding are added where B does not divide over the mesh. In a run of several processes, all of
        them call this with the same tokens.
        """
        output = self._run(tokens_BT, mask_BT)
        with jax.set_mesh(self.mesh):
            logits_BTV = multihost_utils.process_allgather(output.logits_BTV, tiled=True)
        return np.asarray(logits_BTV, np.float32)[: len(tokens_BT)]

    def load_balance_loss(
        self,
        tokens_BT: np.ndarray,
        mask_BT: np.ndarray | None = None,
        normalization: Literal["switch", "hf"] = "hf",
    ) -> float:
        """The auxiliary loss over all layers and real tokens, before its weight: see `model.balance`."""
        output = self._run(tokens_BT, mask_BT)
        with jax.set_mesh(self.mesh):
            return float(load_balance_loss(output.routing.sums, normalization))

    def _run(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None) -> ModelOutput:
        tokens_BT = np.asarray(tokens_BT, np.int32)
        mask_BT = np.ones_like(tokens_BT) if mask_BT is None else np.asarray(mask_BT, np.int32)
        require(
            tokens_BT.ndim == 2 and tokens_BT.shape == mask_BT.shape,
            f"tokens of shape {tokens_BT.shape} and a mask of shape {mask_BT.shape} must both be [B, T]",
        )
        vocab_size = self.config.model.vocab_size
        require(
            tokens_BT.size and 0 <= tokens_BT.min() <= tokens_BT.max() < vocab_size,
            f"there must be tokens, and each must lie in [0, model.vocab_size={vocab_size})",
        )
        rules = self.model.rules
        sharding = jax.NamedSharding(self.mesh, rules.spec("batch", None))
        to_add = -len(tokens_BT) % (self.mesh.size // self.mesh.shape["tensor"])
        rows = (np.pad(array, ((0, to_add), (0, 0))) for array in (tokens_BT, mask_BT))
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(matmul_precision(self.config.model.dtype)):
            return _forward(self.model, *(jax.device_put(array, sharding) for array in rows))


@jax.jit
def _forward(model: Transformer, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> ModelOutput:
    return model(tokens_BT, segment_ids_BT=segment_ids_BT)


def load_pretrained(
    folder: str | Path, dtype: Dtype | None = None, mesh: jax.sharding.Mesh | None = None
) -> Pretrained:
    """The model in `folder`, sharded over `mesh`; each process reads the parts that its devices hold.

    Args:
        folder: a Hugging Face folder.
        dtype: what the model is held and computed in; None keeps that of the folder.
        mesh: by default all devices, with as many on `expert` as divide the experts, and the rest on `data`.

    Raises:
        ConfigError: the folder holds no Mixtral, or a damaged one, or the mesh does not fit; says what and where.
    """
    folder = Path(folder)
    theirs = read_config(folder)
    model = theirs.model if dtype is None else dataclasses.replace(theirs.model, dtype=dtype, param_dtype=dtype)
    # Prompts are of any length: flash attention is for those of training.
    model = dataclasses.replace(model, attention="xla")
    sizes = MeshConfig() if mesh is None else MeshConfig(**{axis: mesh.shape[axis] for axis in MESH_AXES})
    num_devices = jax.device_count() if mesh is None else mesh.size
    train = TrainConfig(num_steps=1, batch_size=num_devices, sequence_length=2)
    config = resolve_mesh(Config(model=model, router=theirs.router, mesh=sizes, train=train), num_devices)
    mesh = mesh or make_mesh(config.mesh)
    platform = mesh.devices.flat[0].platform
    config = dataclasses.replace(config, dispatch=resolve_dispatch(config, platform))
    with jax.set_mesh(mesh):
        weights = load_weights(folder, jax.eval_shape(model_maker(config, platform)))
    return Pretrained(config, weights, _read_tokenizer(folder), mesh)


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.model"
    return Tokenizer(path.read_bytes()) if path.exists() else None
