"""Adapters that we write compute the same in PEFT, and PEFT writes adapters as we do.

Runs PEFT itself, so only `make test-parity` runs these tests: they need peft, torch and
transformers.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mixtral_jax.checkpoint.formats.adapters import write_peft
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import FinetuneConfig, LoRAConfig
from mixtral_jax.training.assemble import Training, make_training
from tests.cases import RULES, mesh_of

torch = pytest.importorskip("torch", reason="parity needs torch: make test-parity installs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Warnings of another package.
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"
TOKENS = np.random.default_rng(0).integers(0, 512, (8, 16), dtype=np.int32)
# Logits are of order 5. The measured difference is 4e-6.
TOLERANCE = 5e-5
ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}


def training_of(lora: LoRAConfig) -> Training:
    config = open_weights(GOLDEN).architecture.config(batch_size=8)
    return make_training(dataclasses.replace(config, finetune=FinetuneConfig(lora=lora)), "cpu")


def tuned_model(lora: LoRAConfig) -> Any:
    """The golden model, with adapters that change its logits."""
    training = training_of(lora)

    def adapt(base: Any) -> Any:
        graphdef, adapters, rest = nnx.split(training.adapt(base), nnx.LoRAParam, ...)
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(adapters))))

        def disturb(leaf: jax.Array) -> jax.Array:
            noise = jax.random.normal(
                next(keys), leaf.shape, out_sharding=jax.typeof(leaf).sharding.spec
            )
            return leaf + 0.05 * noise

        return nnx.merge(graphdef, jax.tree.map(disturb, adapters), rest)

    return jax.jit(adapt)(
        load_model(open_weights(GOLDEN).parameters, jax.eval_shape(training.make_base))
    )


def logits_of(model: Any) -> np.ndarray:
    tokens = jax.device_put(
        TOKENS, jax.NamedSharding(jax.sharding.get_mesh(), RULES.spec("batch", None))
    )
    return np.asarray(jax.jit(lambda model, tokens: model(tokens).logits_BTV)(model, tokens))


@pytest.fixture
def their_model() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize(
    "targets",
    [
        "attention",
        "attention+experts",
        "attention+experts+router",
        "attention.query,moe.experts.down",
    ],
)
def test_peft_computes_what_our_adapters_do_beside_and_in_the_weights(
    targets: str, tmp_path: Path, their_model: Any
) -> None:
    lora = LoRAConfig(rank=4, alpha=12.0, targets=targets)
    with jax.set_mesh(mesh_of(expert=4, fsdp=2)), jax.default_matmul_precision("highest"):
        model = tuned_model(lora)
        write_peft(tmp_path, model, lora, base=str(GOLDEN))
        expected = logits_of(model)
    # The adapters change the logits.
    assert np.abs(their_logits(their_model) - expected).max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.PeftModel.from_pretrained(their_model, str(tmp_path))
        np.testing.assert_allclose(their_logits(tuned), expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(
            their_logits(tuned.merge_and_unload()), expected, rtol=0, atol=TOLERANCE
        )


def with_adapters_of_peft(model: Any, folder: Path) -> Any:
    """Puts the adapters of attention that PEFT saved in a folder into our model, by hand."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for module, name in ATTENTION.items():
        projection = getattr(model.blocks.attention, name)
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            weight = getattr(projection, ours).weight
            layer = "base_model.model.model.layers.{}.self_attn." + f"{module}.{theirs}.weight"
            layers = [tensors[layer.format(number)].T for number in range(len(weight[...]))]
            array = np.stack(layers).reshape(weight[...].shape)
            weight[...] = jax.device_put(array, weight[...].sharding)
    return model


def test_peft_saves_adapters_of_attention_as_we_write_them(
    tmp_path: Path, their_model: Any
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ATTENTION))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(their_model, config)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        theirs.save_pretrained(tmp_path)
    lora = LoRAConfig(rank=4, alpha=8.0, targets="attention")
    with jax.set_mesh(mesh_of(expert=4, fsdp=2)), jax.default_matmul_precision("highest"):
        model = with_adapters_of_peft(tuned_model(lora), tmp_path)
        np.testing.assert_allclose(logits_of(model), their_logits(theirs), rtol=0, atol=TOLERANCE)
        write_peft(again := tmp_path / "again", model, lora, base=str(GOLDEN))
    saved, written = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again)
    )
    assert written.keys() == saved.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    saved, written = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, again)
    )
    assert set(written.pop("target_modules")) == set(saved["target_modules"])
    for key in ("peft_type", "r", "lora_alpha", "bias"):
        assert written[key] == saved[key], key
