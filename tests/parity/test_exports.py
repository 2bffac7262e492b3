"""transformers loads and tokenizes what we export, and we read what transformers and torch save.

Only `make test-parity` runs these tests: they need torch, transformers and mistral-common.
"""

import dataclasses
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.checkpoint import export
from mixtral_jax.checkpoint.export import make_small_files, write_folder
from mixtral_jax.checkpoint.formats.layouts import LAYOUTS, MISTRAL
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.config import ModelConfig
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.cases import mesh_of
from tests.checkpoint.folders import (
    architecture_of,
    in_memory,
    random_parameters,
    read_all,
    tensors_of,
    write_params,
)

torch = pytest.importorskip("torch", reason="parity needs torch: make test-parity installs it")
pytest.importorskip(
    "mistral_common", reason="parity needs mistral-common: make test-parity installs it"
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Warnings of another package.
    transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"
MEGABLOCKS = LAYOUTS[-1]
MODEL = ModelConfig(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=24,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    num_experts=6,
    rope_theta=5e4,
    dtype="float32",
)
# Logits are of order 4. The measured difference is 1.4e-5.
LOGIT_TOLERANCE = 1e-4


def make_weights(
    model: ModelConfig = MODEL, dtype: str = "float32", tokenizer: Tokenizer | None = None
) -> Weights:
    """Weights that are large enough to make routing clear, with norms far from 1."""
    parameters = random_parameters(model, dtype)
    for name, array in parameters.items():
        scale = 1.0 if "norm" in name or "embedding" in name else array.shape[-2] ** -0.5
        parameters[name] = (array * scale).astype(array.dtype)
    model = dataclasses.replace(model, param_dtype=dtype)
    return Weights(
        architecture_of(model, chosen=3), in_memory(parameters, model), tokenizer, "memory"
    )


def load_theirs(folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **settings
    )


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
def test_an_exported_model_computes_the_same_in_transformers(
    max_shard_bytes, tmp_path, monkeypatch
):
    small_shards = dataclasses.replace(export.FORMATS["hf"], max_shard_bytes=max_shard_bytes)
    monkeypatch.setitem(export.FORMATS, "hf", small_shards)
    write_folder(make_weights(), tmp_path, "hf", lambda _: None)
    model, info = load_theirs(tmp_path)
    assert not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert model.dtype == torch.float32
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab_size, (2, 17))
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    for sizes in ({}, {"expert": 2, "fsdp": 2, "tensor": 2}):
        ours = mixtral_jax.load_pretrained(tmp_path, mesh=mesh_of(**sizes)).logits(tokens)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)
    assert np.abs(theirs).max() > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_holds_an_exported_model_in_its_dtype_bit_for_bit(dtype, tmp_path):
    weights = make_weights(dtype=dtype)
    (tmp_path / "ours").mkdir()
    write_folder(weights, tmp_path / "ours", "hf", lambda _: None)
    model, _ = load_theirs(tmp_path / "ours")
    assert str(model.dtype) == f"torch.{dtype}"
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        read_all(open_weights(tmp_path / "ours")),
        read_all(open_weights(tmp_path / "theirs")),
    )
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("is_original", [True, False], ids=["one tensor per expert", "fused"])
def test_both_layouts_that_transformers_saves_are_read(is_original, tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    model = transformers.MixtralForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path, save_original_format=is_original)
    assert ("fused" in open_weights(tmp_path).source) is not is_original
    tokens = np.random.default_rng(3).integers(0, 50, (2, 9))
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    ours = mixtral_jax.load_pretrained(tmp_path, mesh=mesh_of(expert=4)).logits(tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize(("layout", "num_files"), [(MISTRAL, 1), (MEGABLOCKS, 8)])
def test_files_that_torch_saves_are_read(layout, num_files, tmp_path):
    parameters = random_parameters(MODEL)
    tensors = {
        name: torch.tensor(array).bfloat16()
        for name, array in tensors_of(layout, parameters, MODEL).items()
    }
    write_params(tmp_path, MODEL)
    for number in range(num_files):
        here = {name: tensors[name] for name in list(tensors)[number::num_files]}
        torch.save(here, tmp_path / f"consolidated.{number:02}.pt")
    for name, array in read_all(open_weights(tmp_path)).items():
        expected = torch.tensor(parameters[name]).bfloat16().float().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), expected, err_msg=name)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tokenizer, and its export as transformers loads it."""

    ours: Tokenizer
    theirs: Any
    spec: str


def sources() -> list[str]:
    """Some source files of Python's library."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("textwrap.py", "heapq.py", "encodings/idna.py", "tarfile.py", "this.py")
    return [(folder / name).read_text("utf-8") for name in names]


@pytest.fixture(scope="module", params=["train:700", "mixtral", "mixtral-v3"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = load_tokenizer(request.param, sources, folder / "tokenizer.model")
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    for name, text in make_small_files(make_weights(model, tokenizer=tokenizer), "hf").items():
        (folder / name).write_text(text, "utf-8")
    yield Pair(tokenizer, transformers.AutoTokenizer.from_pretrained(folder), request.param)


TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "a",
    " a",
    "  a",
    "a ",
    "a  b",
    "a   b",
    "a\n b",
    "x" + " " * 40 + "y",
    "def f(x):\n    if x:\n        return  x\n\treturn\t\tx\n",
    "\n\n    indented\n",
    "été, ça, à, Œuvre",
    "naïve e\u0301",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 x",
    "漢字かな交じり文。한국어",
    "عربى עברית",
    "1234567890 3.14",
    "\r\n\r\n",
    "\u2581x \u2581",
    "\ufb01 \uff21 \u00a0 \u2003",
    "\x00\x01\x7f",
    "a" * 300,
    "[INST] hi [/INST]",
]


def random_texts() -> list[str]:
    rng = random.Random(0)
    letters = "  \n\tabcdefé漢\U0001f600_(){}01\u2581ß"
    return ["".join(rng.choice(letters) for _ in range(rng.randint(1, 50))) for _ in range(500)]


def test_transformers_gives_the_ids_of_our_tokenizer(pair):
    windows = [
        text[start : start + 500]
        for text in sources()
        for start in range(0, min(len(text), 20_000), 500)
    ]
    for text in TEXTS + random_texts() + windows:
        if pair.spec == "mixtral-v3" and "[INST]" in text:
            continue  # A control piece to transformers; in our tokenizer text never becomes one.
        expected = [pair.ours.bos_id, *pair.ours.encode(text)]
        assert pair.theirs(text)["input_ids"] == expected, repr(text)


def test_transformers_gives_the_text_of_ids(pair):
    for text in TEXTS + random_texts():
        ids = pair.ours.encode(text)
        assert pair.theirs.decode(ids) == pair.ours.decode(ids), repr(text)


def test_special_pieces_are_known(pair):
    assert (pair.theirs.bos_token_id, pair.theirs.eos_token_id) == (
        pair.ours.bos_id,
        pair.ours.eos_id,
    )
    assert len(pair.theirs) == pair.ours.vocab_size
    ids = [pair.ours.bos_id, *pair.ours.encode("hi"), pair.ours.eos_id]
    assert pair.theirs.decode(ids, skip_special_tokens=True) == "hi"


# transformers finds control pieces in any text, and its templates end every answer with EOS.
BEYOND_TRANSFORMERS = {"v1": {"injection_bos_eos_in_user", "assistant_prefix"}}
BEYOND_TRANSFORMERS["v3"] = BEYOND_TRANSFORMERS["v1"] | {"injection_inst_in_user"}


@pytest.mark.parametrize("pair", ["mixtral", "mixtral-v3"], indirect=True)
def test_chat_templates_give_the_ids_of_mistral(pair):
    version = {"mixtral": "v1", "mixtral-v3": "v3"}[pair.spec]
    conversations = json.loads((GOLDEN / "chat.json").read_text("utf-8"))["conversations"]
    compared = 0
    for conversation in conversations:
        expected = conversation.get(f"tokens_{version}")
        if expected is None or conversation["name"] in BEYOND_TRANSFORMERS[version]:
            continue
        got = pair.theirs.apply_chat_template(conversation["messages"], return_dict=False)
        assert got == expected, conversation["name"]
        compared += 1
    assert compared >= 15
