"""Loads a model from a folder: `load_pretrained`, and the `Pretrained` that it returns.

It composes the rooms below it: `checkpoint` reads the weights, `parallel` lays them out, `data` has
the tokenizer and the chat template, and `generate` continues prompts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.checkpoint.formats.side_files import SideFiles
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import Config, ConfigError, LiteralInst, MeshConfig, local_path, require
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

# The context of Mixtral. Rotary positions have no limit, so a model may read more tokens than the
# sequences it was trained on, as far as memory allows.
_MIN_CONTEXT_TOKENS = 32_768


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on its mesh, with all that it needs to answer.

    Attributes:
        config: the config that the model was built with; its mesh has the sizes of `mesh`.
        tokenizer: the tokenizer of the folder; None if it has none.
        kernels: the implementations that the model runs, chosen for the devices of `mesh`.
        side_files: what the folder says beside its weights, such as the ids that end a text.
        notes: what of the folder is not followed here, to be shown to people.
    """

    config: Config
    model: Transformer
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh
    kernels: Kernels
    side_files: SideFiles = dataclasses.field(default_factory=SideFiles)
    notes: tuple[str, ...] = ()

    def logits(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
        """Next-token logits of int [B, T] tokens: float32 [B, T, V].

        Logits where the mask is 0 have no meaning. If B does not divide over the mesh, rows of
        padding are added. In a run of several processes, all of them must call this with the same
        tokens.
        """
        output = self._run(tokens_BT, mask_BT)
        with jax.set_mesh(self.mesh):
            logits_BTV = multihost_utils.process_allgather(output.logits_BTV, tiled=True)
        return np.asarray(logits_BTV, np.float32)[: len(tokens_BT)]

    @functools.cached_property
    def generator(self) -> Generator:
        """The generator behind `generate` and `chat`, which keeps compiled programs."""
        context = max(self.config.train.sequence_length, _MIN_CONTEXT_TOKENS)
        return Generator(self.model, self.mesh, self.tokenizer, context, self.side_files.eos_ids)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], **settings: Any
    ) -> str | list[int] | list[str | list[int]]:
        """Continues a prompt, or a list of prompts in one batch.

        Args:
            prompt: a text, before which BOS is put; a list of ids, which is used as it is; or a
                list of texts or of such lists.
            settings: fields of `generate.settings.Settings`, such as max_new_tokens, temperature
                and stop.

        Returns:
            The new text for a text, the new ids for ids; a list of these for a list of prompts.

        Raises:
            ConfigError: a setting is out of range; a prompt is empty or too long; or a prompt is a
                text, and the model has no tokenizer.
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
        """The model's answer, piece by piece, in the folder's own chat template if we know it.

        Args:
            messages: the conversation, such as `[{"role": "user", "content": "Hi"}]`. The model
                answers the last message, or continues it if its `prefix` is true.
            safe_mode: puts Mistral's guardrail before the conversation, as system text.
            literal_inst: how to treat a literal `[INST]` in a message: see
                `data.chat.template.ChatTemplate`.
            speed: counts tokens and seconds if given.
            settings: as in `generate`.

        Raises:
            ConfigError: there is no tokenizer, or a setting or the conversation is wrong. The
                message names the place.
        """
        if self.tokenizer is None:
            raise ConfigError("a chat needs a tokenizer, and this model came without one")
        guardrail = [{"role": "system", "content": SAFE_PROMPT}] if safe_mode else []
        template = ChatTemplate(self.tokenizer, self.side_files.template, literal_inst=literal_inst)
        ids = template.encode([*guardrail, *messages], mode="serving").tokens.tolist()
        is_answer = messages[-1]["role"] != "assistant"
        shown = 0
        for (answer,) in self.generator.stream(
            [ids], Settings.of(**settings), speed, is_answer=is_answer
        ):
            yield answer.text[shown:]
            shown = len(answer.text)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt. Those of a text begin with BOS.

        Raises:
            ConfigError: the prompt is a text, and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ConfigError(
                "a prompt of text needs a tokenizer, and this model came without one: give ids"
            )
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]

    def load_balance_loss(
        self,
        tokens_BT: np.ndarray,
        mask_BT: np.ndarray | None = None,
        normalization: Literal["switch", "hf"] = "hf",
    ) -> float:
        """The auxiliary loss over all layers and real tokens, before its weight.

        See `model.balance.load_balance_loss`.
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
    """Loads the model in `folder`, sharded over `mesh`.

    Each process reads only the parts that its devices hold. The model drops no routes, whatever
    capacity it was trained with.

    Args:
        folder: the workdir of a run (its newest checkpoint), one step of it, or a folder in the
            format of Hugging Face or Mistral.
        dtype: the dtype that weights are held in and computed in, except that float16 is computed
            in float32. None keeps the dtype of the folder.
        mesh: a mesh, or the sizes of one over all devices. By default `expert` is the
            greatest common divisor of the numbers of experts and devices, and `data` takes the
            rest.

    Raises:
        ConfigError: the folder holds no Mixtral or a damaged one, or the mesh does not fit. The
            message names the place.
    """
    weights = open_weights(local_path(folder, "the checkpoint"))
    if dtype is not None:
        weights = weights.astype(dtype)
    if isinstance(mesh, jax.sharding.Mesh):
        sizes, num_devices = MeshConfig(**{axis: mesh.shape[axis] for axis in MESH_AXES}), mesh.size
    else:
        sizes, num_devices = mesh or MeshConfig(), jax.device_count()
    config = weights.architecture.config(batch_size=num_devices)
    # It may have been trained on other devices, with another attention.
    model_config = dataclasses.replace(config.model, attention="auto")
    config = dataclasses.replace(config, model=model_config, mesh=sizes)
    config = resolve_mesh(config, num_devices)
    mesh = mesh if isinstance(mesh, jax.sharding.Mesh) else make_mesh(config.mesh)
    kernels = choose_kernels(config, mesh.devices.flat[0].platform)
    # Unlike in training, dense weights are not sharded over `expert`: they would be gathered again
    # for each generated token.
    rules = AxisRules(dense_embed="fsdp")
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(model_maker(config, kernels, rules))
        model = load_model(weights.parameters, shapes)
    return Pretrained(
        config, model, weights.tokenizer, mesh, kernels, weights.side_files, weights.notes
    )
