"""A model from a folder, ready to be asked: `load_pretrained` and what it returns.

Composes rooms below it: `checkpoint` reads the weights, `parallel` lays them out, `data` has the
tokenizer and the chat template, `generate` writes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import Config, ConfigError, LiteralInst, MeshConfig, require
from mixtral_jax.data.chat.template import SAFE_PROMPT, ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generate.generator import Generator, Speed
from mixtral_jax.generate.settings import Settings
from mixtral_jax.kernels.choose import Kernels, choose_kernels
from mixtral_jax.model.balance import load_balance_loss
from mixtral_jax.model.transformer import ModelOutput, Transformer, model_maker
from mixtral_jax.parallel.mesh import MESH_AXES, make_mesh, matmul_precision, resolve_mesh
from mixtral_jax.parallel.rules import AxisRules

Dtype = Literal["float32", "bfloat16", "float16"]
Prompt = str | Sequence[int]

# Mixtral's own. Rotary positions have no end: what a model was trained on is no bound, but memory
# is.
_SHORTEST_CONTEXT = 32_768


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
    kernels: Kernels

    def logits(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
        """Next-token logits of int [B, T] tokens, float32 [B, T, V]; meaningless where the mask is
        0.

        Rows of padding are added where B does not divide over the mesh. In a run of several
        processes, all of them call this with the same tokens.
        """
        output = self._run(tokens_BT, mask_BT)
        with jax.set_mesh(self.mesh):
            logits_BTV = multihost_utils.process_allgather(output.logits_BTV, tiled=True)
        return np.asarray(logits_BTV, np.float32)[: len(tokens_BT)]

    @functools.cached_property
    def generator(self) -> Generator:
        """What `generate` and `chat` ask; it keeps the programs that are compiled."""
        context = max(self.config.train.sequence_length, _SHORTEST_CONTEXT)
        return Generator(self.model, self.mesh, self.tokenizer, context)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], **settings: Any
    ) -> str | list[int] | list[str | list[int]]:
        """Continues a prompt, or a list of prompts in one batch.

        Args:
            prompt: text, which BOS is put before; a list of ids, which nothing is; or a list of
                texts or of lists.
            settings: fields of `generate.settings.Settings`, such as max_new_tokens, temperature
                and stop.

        Returns:
            The new text of a text, the new ids of ids; a list of them for a list of prompts.

        Raises:
            ConfigError: a setting is out of range, a prompt is empty or too long, or is text
                without a tokenizer.
        """
        is_one = isinstance(prompt, str) or (
            len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
        )
        prompts: list[Any] = [prompt] if is_one else list(prompt)
        rows = self.generator.generate(
            [self.encode(each) for each in prompts], Settings.of(**settings)
        )
        new = [
            row.text if isinstance(each, str) else row.ids
            for each, row in zip(prompts, rows, strict=True)
        ]
        return new[0] if is_one else new

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        safe_mode: bool = False,
        literal_inst: LiteralInst = "reject",
        **settings: Any,
    ) -> str:
        """The model's answer to a conversation; see `stream_chat`."""
        return "".join(
            self.stream_chat(messages, safe_mode=safe_mode, literal_inst=literal_inst, **settings)
        )

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        safe_mode: bool = False,
        literal_inst: LiteralInst = "reject",
        speed: Speed | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The model's answer, a piece at a time.

        Args:
            messages: such as `[{"role": "user", "content": "Hi"}]`; the last is to be answered, or
                has `prefix` true.
            safe_mode: puts Mistral's guardrail before the conversation, as system text.
            literal_inst: what becomes of a written `[INST]`: see `data.chat.ChatTemplate`.
            speed: where to count tokens and seconds.
            settings: as of `generate`.

        Raises:
            ConfigError: there is no tokenizer, or a setting or the conversation is wrong; says
                where.
        """
        if self.tokenizer is None:
            raise ConfigError("a chat needs a tokenizer, and this model came without one")
        guardrail = [{"role": "system", "content": SAFE_PROMPT}] if safe_mode else []
        template = ChatTemplate(self.tokenizer, literal_inst=literal_inst)
        ids = template.encode([*guardrail, *messages], mode="serving").tokens.tolist()
        is_answer = messages[-1]["role"] != "assistant"
        shown = 0
        for (answer,) in self.generator.stream(
            [ids], Settings.of(**settings), speed, is_answer=is_answer
        ):
            yield answer.text[shown:]
            shown = len(answer.text)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: those of text follow BOS.

        Raises:
            ConfigError: it is text, and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ConfigError(
                "a prompt of text needs a tokenizer, and this model came without one: give token "
                "ids"
            )
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]

    def load_balance_loss(
        self,
        tokens_BT: np.ndarray,
        mask_BT: np.ndarray | None = None,
        normalization: Literal["switch", "hf"] = "hf",
    ) -> float:
        """The auxiliary loss over all layers and real tokens, before its weight: see
        `model.balance`.
        """
        output = self._run(tokens_BT, mask_BT)
        with jax.set_mesh(self.mesh):
            return float(load_balance_loss(output.routing.sums, normalization))

    def _run(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None) -> ModelOutput:
        tokens_BT = np.asarray(tokens_BT, np.int32)
        mask_BT = np.ones_like(tokens_BT) if mask_BT is None else np.asarray(mask_BT, np.int32)
        require(
            tokens_BT.ndim == 2 and tokens_BT.shape == mask_BT.shape,
            f"tokens of shape {tokens_BT.shape} and a mask of shape {mask_BT.shape} must both be "
            "[B, T]",
        )
        vocab_size = self.config.model.vocab_size
        require(
            tokens_BT.size and 0 <= tokens_BT.min() <= tokens_BT.max() < vocab_size,
            f"there must be tokens, and each must lie in [0, model.vocab_size={vocab_size})",
        )
        rules = self.model.rules
        sharding = jax.NamedSharding(self.mesh, rules.spec("batch", None))
        to_add = -len(tokens_BT) % rules.count_row_devices(self.mesh)
        rows = (np.pad(array, ((0, to_add), (0, 0))) for array in (tokens_BT, mask_BT))
        with (
            jax.set_mesh(self.mesh),
            jax.default_matmul_precision(matmul_precision(self.config.model.dtype)),
        ):
            return _forward(self.model, *(jax.device_put(array, sharding) for array in rows))


@jax.jit
def _forward(model: Transformer, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> ModelOutput:
    return model(tokens_BT, segment_ids_BT=segment_ids_BT)


def load_pretrained(
    folder: str | Path,
    dtype: Dtype | None = None,
    mesh: jax.sharding.Mesh | MeshConfig | None = None,
) -> Pretrained:
    """The model in `folder`, sharded over `mesh`; each process reads the parts that its devices
    hold.

    No route is dropped, whatever capacity the model was trained with.

    Args:
        folder: a run's workdir (its newest checkpoint), one step of it, or a folder of Hugging Face
            or of Mistral.
        dtype: what the weights are held in, and computed in, except that float16 is computed in
            float32; None keeps that of the folder.
        mesh: one, or the sizes of one over all devices; by default with as many on `expert` as
            divide the experts, and the rest on `data`.

    Raises:
        ConfigError: the folder holds no Mixtral, or a damaged one, or the mesh does not fit; says
            what and where.
    """
    weights = open_weights(Path(folder))
    if dtype is not None:
        weights = weights.astype(dtype)
    if isinstance(mesh, jax.sharding.Mesh):
        sizes, num_devices = MeshConfig(**{axis: mesh.shape[axis] for axis in MESH_AXES}), mesh.size
    else:
        sizes, num_devices = mesh or MeshConfig(), jax.device_count()
    config = weights.architecture.config(batch_size=num_devices)
    # Whatever it was trained with, elsewhere perhaps.
    model = dataclasses.replace(config.model, attention="auto")
    config = resolve_mesh(dataclasses.replace(config, model=model, mesh=sizes), num_devices)
    mesh = mesh if isinstance(mesh, jax.sharding.Mesh) else make_mesh(config.mesh)
    platform = mesh.devices.flat[0].platform
    kernels = choose_kernels(config, platform)
    # Not cut over `expert`, as in training: dense weights would be gathered anew for each token
    # that is written.
    rules = AxisRules(dense_embed="fsdp")
    with jax.set_mesh(mesh):
        loaded = load_model(
            weights.parameters, jax.eval_shape(model_maker(config, kernels, rules))
        )
    return Pretrained(config, loaded, weights.tokenizer, mesh, kernels)
