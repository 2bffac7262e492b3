"""Exported folders: their files, what they say about the model, and which models are refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint import export
from mixtral_jax.checkpoint.export import FORMATS, make_small_files, write_folder
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE, MISTRAL
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ConfigError, RouterConfig
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.runs.import_weights import import_weights
from tests.checkpoint.folders import (
    SMALL,
    assert_same_weights,
    random_parameters,
    random_weights,
    read_all,
    tensors_of,
    write_config,
    write_params,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_config_keeps_its_values(tmp_path):
    """The file has the keys of transformers 4 and of 5."""
    assert run_verb(["export", f"--checkpoint={GOLDEN / 'hf_tiny'}", f"--to={tmp_path / 'h'}"]) == 0
    ours, theirs = (
        json.loads((path / "config.json").read_text())
        for path in (tmp_path / "h", GOLDEN / "hf_tiny")
    )
    # These keys belong to one release, or to generation, and not to the model.
    ignored = {"transformers_version", "pad_token_id"}
    assert {key: ours.get(key) for key in theirs.keys() - ignored} == {
        key: theirs[key] for key in theirs.keys() - ignored
    }
    assert ours["rope_theta"] == ours["rope_parameters"]["rope_theta"] == 1e6
    assert ours["torch_dtype"] == ours["dtype"] == "float32"
    assert (
        open_weights(tmp_path / "h").architecture == open_weights(GOLDEN / "hf_tiny").architecture
    )


def test_rope_theta_is_always_written_and_its_default_is_reported(tmp_path):
    weights = random_weights(SMALL, 2, "float32")
    for format_, name in (("hf", "config.json"), ("mistral", "params.json")):
        folder = tmp_path / format_
        folder.mkdir()
        write_folder(weights, folder, format_, lambda _: None)
        assert json.loads((folder / name).read_text())["rope_theta"] == 5e4
        assert open_weights(folder).architecture.notes == ()
        change = write_config if format_ == "hf" else write_params
        change(
            folder, SMALL, rope_theta=None, **({"rope_parameters": None} if format_ == "hf" else {})
        )
        found = open_weights(folder).architecture
        assert found.model.rope_theta == 1e6
        assert "no rope_theta: uses 1e+06" in found.notes[0]


def test_params_are_those_that_mistral_inference_takes():
    files = make_small_files(random_weights(SMALL, 2, "bfloat16"), "mistral")
    assert json.loads(files["params.json"]) == {
        "dim": 12,
        "n_layers": 2,
        "head_dim": 4,
        "hidden_dim": 10,
        "n_heads": 6,
        "n_kv_heads": 3,
        "norm_eps": 1e-6,
        "vocab_size": 21,
        "rope_theta": 5e4,
        "moe": {"num_experts_per_tok": 2, "num_experts": 5},
    }


def test_shards_are_cut_at_their_size_and_listed(tmp_path, monkeypatch):
    small_shards = dataclasses.replace(export.FORMATS["hf"], max_shard_bytes=4000)
    monkeypatch.setitem(export.FORMATS, "hf", small_shards)
    weights = random_weights(SMALL, 2, "float32")
    write_folder(weights, tmp_path, "hf", lambda _: None)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_parameters": weights.num_parameters,
        "total_size": weights.nbytes,
    }
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    number = len(shards)
    assert shards == [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4000
        assert {index["weight_map"][name] for name in tensors} == {shard}
    assert_same_weights(open_weights(tmp_path), weights)


def test_numbers_begin_at_a_multiple_of_eight_bytes(tmp_path):
    write_folder(random_weights(SMALL, 2, "bfloat16"), tmp_path, "hf", lambda _: None)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_cast_to_the_dtype_of_the_flag(format_, dtype, tmp_path):
    arguments = [
        f"--checkpoint={GOLDEN / 'hf_tiny'}",
        f"--to={tmp_path / 'out'}",
        f"--format={format_}",
    ]
    assert run_verb(["export", *arguments, f"--dtype={dtype}"]) == 0
    found = open_weights(tmp_path / "out")
    expected = read_all(open_weights(GOLDEN / "hf_tiny"))
    for name, array in read_all(found).items():
        np.testing.assert_array_equal(array, expected[name].astype(DTYPES[dtype]))
    assert found.architecture.model.param_dtype == dtype
    if format_ == "hf":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_tokenizer_is_exported_and_converted_for_hugging_face(tmp_path):
    texts = [f"def f{n}(x):\n    return x  # the {n}th of some functions" for n in range(200)]
    tokenizer = load_tokenizer("train:300", lambda: texts, tmp_path / "tokenizer.model")
    model = dataclasses.replace(SMALL, vocab_size=300)
    write_folder(random_weights(model, 2, "float32", tokenizer), tmp_path, "hf", lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    assert len(words["model"]["vocab"]) == 300
    assert [token["content"] for token in words["added_tokens"]] == ["<unk>", "<s>", "</s>"]
    assert {"".join(pair) for pair in words["model"]["merges"]} <= words["model"]["vocab"].keys()
    assert (
        "[INST] " in json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    )
    import_weights(open_weights(tmp_path), tmp_path / "run")
    found = open_weights(tmp_path / "run").tokenizer
    assert found is not None
    assert found.fingerprint == tokenizer.fingerprint


def test_keys_that_a_format_cannot_express_are_named(tmp_path):
    """With keys that the router may have one day: the check does not list keys by name."""
    fields = [
        ("score", str, dataclasses.field(default="softmax")),
        ("num_shared", int, dataclasses.field(default=0)),
    ]
    router_class = dataclasses.make_dataclass(
        "Router", fields, bases=(RouterConfig,), frozen=True, kw_only=True
    )
    weights = random_weights(SMALL, 2, "float32")
    for router, words in (
        (router_class(), None),
        (
            router_class(score="sigmoid", num_shared=1),
            "router.score='sigmoid', router.num_shared=1",
        ),
    ):
        architecture = dataclasses.replace(weights.architecture, router=router)
        changed = dataclasses.replace(weights, architecture=architecture)
        for format_ in FORMATS:
            if words is None:
                make_small_files(changed, format_)
                continue
            with pytest.raises(ConfigError, match=f"cannot have {words}"):
                make_small_files(changed, format_)


@pytest.mark.parametrize(("verb", "flag"), [("import", "--from"), ("export", "--checkpoint")])
def test_nothing_is_written_to_a_path_that_exists(verb, flag, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for to in ("full", "full/file", "full/file/below", "link"):
        with pytest.raises(ConfigError, match=to):
            run_verb([verb, f"{flag}={GOLDEN / 'hf_tiny'}", f"--to={tmp_path / to}"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "link"]


def test_an_export_that_fails_leaves_nothing_behind(tmp_path):
    write_config(tmp_path, SMALL)
    save_file(
        tensors_of(HUGGING_FACE, random_parameters(SMALL), SMALL), tmp_path / "model.safetensors"
    )
    import_weights(open_weights(tmp_path), tmp_path / "run")
    (
        tmp_path / "run/checkpoints/0/state/trained/blocks/moe/experts/up/weight/value/1.4.0.0"
    ).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ConfigError,
        match=r"experts/up/weight/value/1\.4\.0\.0: the chunk cannot be read: No such file",
    ):
        run_verb(["export", f"--checkpoint={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"])
    assert sorted(tmp_path.rglob("*")) == before


def test_mistral_weights_get_transformers_defaults_for_the_router_losses():
    balance = open_weights(GOLDEN / "mistral_tiny").architecture.router.load_balance
    assert (balance.normalization, balance.weight) == ("hf", 0.001)


def test_tensors_are_written_layer_by_layer():
    names = list(tensors_of(MISTRAL, random_parameters(SMALL), SMALL))
    layers = [name.split(".")[1] for name in names if name.startswith("layers.")]
    assert layers == sorted(layers)
