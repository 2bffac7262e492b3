"""Adapters that we write compute in PEFT, on transformers' model, what they compute here, live.

Run by `make test-parity` alone: needs peft, torch and transformers.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mixtral_jax.checkpoint.formats.adapters import read_adapters, read_peft_config, write_peft
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import FinetuneConfig, LoRAConfig
from mixtral_jax.training.assemble import Training, make_training
from tests.cases import RULES, mesh_of

torch = pytest.importorskip("torch", reason="parity needs torch: make test-parity installs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Not ours to mend.
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"
TOKENS = np.random.default_rng(0).integers(0, 512, (8, 16), dtype=np.int32)
# Logits are of order 5. Measured: 4e-6.
TOLERANCE = 5e-5


def tunable_of(lora: LoRAConfig) -> Training:
    config = open_weights(GOLDEN).architecture.config(batch_size=8)
    return make_training(dataclasses.replace(config, finetune=FinetuneConfig(lora=lora)), "cpu")


def tuned_model(lora: LoRAConfig) -> Any:
    """The golden model, with adapters that change its logits."""
    tunable = tunable_of(lora)

    def adapt(base: Any) -> Any:
        graphdef, adapters, rest = nnx.split(tunable.adapt(base), nnx.LoRAParam, ...)
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(adapters))))

        def disturb(leaf: jax.Array) -> jax.Array:
            noise = jax.random.normal(
                next(keys), leaf.shape, out_sharding=jax.typeof(leaf).sharding.spec
            )
            return leaf + 0.05 * noise

        return nnx.merge(graphdef, jax.tree.map(disturb, adapters), rest)

    return jax.jit(adapt)(
        load_model(open_weights(GOLDEN).parameters, jax.eval_shape(tunable.make_base))
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
    assert np.abs(their_logits(their_model) - expected).max() > 0.1  # They do something.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.PeftModel.from_pretrained(their_model, str(tmp_path))
        np.testing.assert_allclose(their_logits(tuned), expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(
            their_logits(tuned.merge_and_unload()), expected, rtol=0, atol=TOLERANCE
        )


def test_adapters_of_attention_that_peft_saves_are_read(tmp_path: Path, their_model: Any) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(their_model, config)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(len(name))
                )
        theirs.save_pretrained(tmp_path)
    lora = read_peft_config(tmp_path)
    assert lora.targets == "attention.query,attention.key,attention.value,attention.out"
    with jax.set_mesh(mesh_of(expert=4, fsdp=2)), jax.default_matmul_precision("highest"):
        model = read_adapters(tmp_path, tuned_model(lora), lora)
        np.testing.assert_allclose(logits_of(model), their_logits(theirs), rtol=0, atol=TOLERANCE)
        write_peft(again := tmp_path / "again", model, lora, base=str(GOLDEN))
    saved, written = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again)
    )
    assert written.keys() == saved.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
