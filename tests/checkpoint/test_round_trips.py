"""What goes in comes out, bit for bit: through a run's checkpoint, and through the formats of other
programs.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint.export import FORMATS, make_small_files, write_folder
from mixtral_jax.checkpoint.files import file_tensor, stored
from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.checkpoint.formats.layouts import HUGGING_FACE, MISTRAL
from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.cli.import_weights import import_weights
from mixtral_jax.cli.main import run_verb
from mixtral_jax.config import ConfigError, ModelConfig, RouterConfig
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoint.folders import (
    SMALL,
    architecture_of,
    in_memory,
    random_parameters,
    read_all,
    tensors_of,
    write_config,
    write_params,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def make_weights(
    model: ModelConfig, chosen: int, dtype: str, tokenizer: Tokenizer | None = None
) -> Weights:
    model = dataclasses.replace(model, param_dtype=dtype)
    parameters = in_memory(random_parameters(model, dtype), model)
    return Weights(architecture_of(model, chosen), parameters, tokenizer, "memory")


def assert_equal(found: Weights, expected: Weights) -> None:
    theirs = read_all(expected)
    for name, array in read_all(found).items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name


def random_model(seed: int) -> tuple[ModelConfig, int, str]:
    """Sizes, experts a token and dtype, of which hardly any two agree."""
    rng = np.random.default_rng(seed)
    num_kv_heads, num_experts = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    model = ModelConfig(
        vocab_size=int(rng.integers(3, 40)),
        hidden_size=int(rng.integers(1, 20)),
        intermediate_size=int(rng.integers(1, 20)),
        num_layers=int(rng.integers(1, 4)),
        num_heads=num_kv_heads * int(rng.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * int(rng.integers(1, 6)),
        num_experts=num_experts,
        rope_theta=float(rng.choice([1e4, 1e6, 12_345.5])),
        norm_eps=float(rng.choice([1e-5, 1e-6])),
    )
    return model, int(rng.integers(1, num_experts + 1)), str(rng.choice(list(DTYPES)))


@pytest.mark.parametrize("seed", range(8))
def test_random_models_come_back_through_both_formats_and_a_run(seed, tmp_path):
    model, chosen, dtype = random_model(seed)
    weights = make_weights(model, chosen, dtype)
    for number, (format_, is_imported) in enumerate(
        (("hf", True), ("mistral", True), ("hf", False))
    ):
        folder = tmp_path / f"{number}-{format_}"
        folder.mkdir()
        write_folder(weights, folder, format_, lambda _: None)
        found = open_weights(folder)
        assert_equal(found, weights)
        wanted = dataclasses.replace(
            model, dtype="bfloat16" if dtype == "bfloat16" else "float32", param_dtype=dtype
        )
        assert found.architecture.model == wanted
        assert found.architecture.router.num_experts_per_token == chosen
        if is_imported:
            import_weights(found, tmp_path / f"{number}-run")
            found = open_weights(tmp_path / f"{number}-run")
            assert_equal(found, weights)
            assert found.architecture.model == wanted
        weights = found


@pytest.mark.parametrize("folder", ["hf_tiny", "mistral_tiny"])
def test_the_files_that_other_programs_wrote_are_written_again(folder, tmp_path):
    """hf -> run -> mistral -> hf, and the other way round: tensors of equal names, bit for bit."""
    import_weights(open_weights(GOLDEN / folder), tmp_path / "run")
    assert (
        run_verb(
            [
                "export",
                f"--checkpoint={tmp_path / 'run'}",
                f"--to={tmp_path / 'm'}",
                "--format=mistral",
            ]
        )
        == 0
    )
    assert run_verb(["export", f"--checkpoint={tmp_path / 'm'}", f"--to={tmp_path / 'h'}"]) == 0
    for found, expected in (
        (
            tmp_path / "m" / "consolidated.safetensors",
            GOLDEN / "mistral_tiny" / "consolidated.safetensors",
        ),
        (tmp_path / "h" / "model.safetensors", GOLDEN / "hf_tiny" / "model.safetensors"),
    ):
        ours, theirs = load_file(found), load_file(expected)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].tobytes() == theirs[name].tobytes(), name


def test_the_chunk_of_an_imported_expert_has_the_bytes_of_its_tensor(tmp_path):
    """Nothing is transposed on the way: zarr is told that it lies in the order of Fortran."""
    import_weights(open_weights(GOLDEN / "hf_tiny"), tmp_path / "run")
    tensors = load_file(GOLDEN / "hf_tiny" / "model.safetensors")
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        chunks = (
            tmp_path / f"run/checkpoints/0/state/trained/blocks/moe/experts/{ours}/weight/value"
        )
        assert json.loads((chunks / ".zarray").read_text())["order"] == "F"
        tensor = tensors[f"model.layers.1.block_sparse_moe.experts.5.{theirs}.weight"]
        assert (chunks / "1.5.0.0").read_bytes() == tensor.tobytes()


@pytest.mark.parametrize("folder", ["hf_tiny", "mistral_tiny"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_chunks_that_are_copied_in_parts_are_whole(folder, dtype, tmp_path, monkeypatch):
    weights = open_weights(GOLDEN / folder)
    weights = weights.astype(dtype) if dtype else weights
    expected = read_all(weights)
    monkeypatch.setattr(stored, "PART_BYTES", 1000)
    monkeypatch.setattr(file_tensor, "PART_BYTES", 300)
    import_weights(weights, tmp_path / "run")
    for name, array in read_all(open_weights(tmp_path / "run")).items():
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_imported_is_a_checkpoint_as_orbax_restores_it(dtype, tmp_path):
    import_weights(make_weights(SMALL, 2, dtype), tmp_path / "run")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    expected = random_parameters(SMALL, dtype)
    wanted = {
        f"trained/{name}/value": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
        for name, array in expected.items()
    }
    with RunCheckpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() == 0
        assert checkpoints.read_record(0)["tokens"] == 0
        restored = checkpoints.restore(0, wanted)
    for name, array in expected.items():
        np.testing.assert_array_equal(restored[f"trained/{name}/value"], array, err_msg=name)


def test_a_config_keeps_what_it_said(tmp_path):
    """In the spelling of transformers 4 and 5 at once."""
    assert run_verb(["export", f"--checkpoint={GOLDEN / 'hf_tiny'}", f"--to={tmp_path / 'h'}"]) == 0
    ours, theirs = (
        json.loads((path / "config.json").read_text())
        for path in (tmp_path / "h", GOLDEN / "hf_tiny")
    )
    # Not of the model: of one release, or of generation.
    ignored = {"transformers_version", "pad_token_id"}
    assert {key: ours.get(key) for key in theirs.keys() - ignored} == {
        key: theirs[key] for key in theirs.keys() - ignored
    }
    assert ours["rope_theta"] == ours["rope_parameters"]["rope_theta"] == 1e6
    assert ours["torch_dtype"] == ours["dtype"] == "float32"
    assert (
        open_weights(tmp_path / "h").architecture == open_weights(GOLDEN / "hf_tiny").architecture
    )


def test_a_base_of_positions_is_always_written_and_said_where_it_was_not(tmp_path):
    weights = make_weights(SMALL, 2, "float32")
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
        assert "no rope_theta: taken as 1e+06" in found.notes[0]


def test_params_are_those_that_mistral_inference_takes():
    files = make_small_files(make_weights(SMALL, 2, "bfloat16"), "mistral")
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


def test_shards_are_cut_at_their_size_and_listed(tmp_path):
    weights = make_weights(SMALL, 2, "float32")
    write_folder(weights, tmp_path, "hf", lambda _: None, shard_bytes=4000)
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
    assert_equal(open_weights(tmp_path), weights)


def test_numbers_begin_where_they_can_be_mapped(tmp_path):
    write_folder(make_weights(SMALL, 2, "bfloat16"), tmp_path, "hf", lambda _: None)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_cast_where_that_is_asked(format_, dtype, tmp_path):
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


def test_a_tokenizer_goes_along_and_its_words_are_written_for_hugging_face(tmp_path):
    texts = [f"def f{n}(x):\n    return x  # the {n}th of some functions" for n in range(200)]
    tokenizer = load_tokenizer("train:300", lambda: texts, tmp_path / "tokenizer.model")
    model = dataclasses.replace(SMALL, vocab_size=300)
    write_folder(make_weights(model, 2, "float32", tokenizer), tmp_path, "hf", lambda _: None)
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


def test_what_a_format_has_no_words_for_is_named(tmp_path):
    """Keys of routers to come, for which the check is."""
    fields = [
        ("score", str, dataclasses.field(default="softmax")),
        ("num_shared", int, dataclasses.field(default=0)),
    ]
    router_class = dataclasses.make_dataclass(
        "Router", fields, bases=(RouterConfig,), frozen=True, kw_only=True
    )
    weights = make_weights(SMALL, 2, "float32")
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
def test_nothing_is_written_where_something_lies(verb, flag, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for to in ("full", "full/file", "full/file/below", "link"):
        with pytest.raises(ConfigError, match=to):
            run_verb([verb, f"{flag}={GOLDEN / 'hf_tiny'}", f"--to={tmp_path / to}"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "link"]


def test_an_export_that_breaks_off_leaves_nothing_behind(tmp_path):
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


def test_mistral_weights_have_transformers_defaults_for_the_losses_that_nobody_wrote_down():
    balance = open_weights(GOLDEN / "mistral_tiny").architecture.router.load_balance
    assert (balance.normalization, balance.weight) == ("hf", 0.001)


def test_tensors_are_written_layer_by_layer():
    names = list(tensors_of(MISTRAL, random_parameters(SMALL), SMALL))
    layers = [name.split(".")[1] for name in names if name.startswith("layers.")]
    assert layers == sorted(layers)
