"""Data sets of the Hub, with configs and splits, and folders that are like repositories there."""

import json

import datasets
import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data import hub
from mixtral_jax.data.documents import Document, read_documents
from mixtral_jax.data.fingerprint import fingerprint_data
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.sources import find_held_out
from tests.data.text_files import texts

METADATA = """---
configs:
- config_name: en
  data_dir: en
- config_name: fr
  data_dir: fr
---
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Two data sets with rows in two languages: one declares them as configs, one has folders."""
    root = tmp_path_factory.mktemp("repositories")
    for name in ("declared", "plain"):
        for language in ("en", "fr"):
            (root / name / language).mkdir(parents=True)
            for split in ("train", "test"):
                row = {"text": f"{language} {split}"}
                (root / name / language / f"{split}.jsonl").write_text(json.dumps(row))
    (root / "declared" / "README.md").write_text(METADATA)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf")
    hub._list_configs.cache_clear()


@pytest.mark.parametrize("name", ["declared", "plain"])
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (":en", "en train"),
        (":fr:test", "fr test"),
        (":fr:train", "fr train"),
        (":en:test[:1]", "en test"),
    ],
)
def test_a_config_and_a_split_are_told_apart(repositories, name, parts, expected):
    assert texts(f"hub:{repositories / name}{parts}") == [expected]


def test_a_second_part_that_is_no_config_is_a_split(repositories, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    assert texts(f"hub:{tmp_path}:test") == ["test"]
    assert texts(f"hub:{tmp_path}:train[:1]") == texts(f"hub:{tmp_path}") == ["train"]
    # Folders without data are no configs.
    (tmp_path / "scripts").mkdir()
    assert texts(f"hub:{tmp_path}:train") == ["train"]
    everything = f"hub:{repositories / 'plain'}:default"
    assert sorted(texts(f"{everything}:test")) == ["en test", "fr test"]


def test_a_default_that_is_declared_needs_no_name(tmp_path):
    metadata = METADATA.replace("- config_name: fr", "- config_name: fr\n  default: true")
    (tmp_path / "README.md").write_text(metadata)
    for language in ("en", "fr"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "train.jsonl").write_text(json.dumps({"text": language}))
    assert texts(f"hub:{tmp_path}") == texts(f"hub:{tmp_path}:train") == ["fr"]


@pytest.mark.parametrize("kind", [datasets.Dataset, datasets.DatasetDict])
def test_what_save_to_disk_wrote_is_named_without_the_word_hub(tmp_path, kind):
    saved = datasets.Dataset.from_dict({"text": ["a"]})
    saved = saved if kind is datasets.Dataset else datasets.DatasetDict(train=saved)
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=f"leave out hub:, as in data.path={tmp_path}/saved$"):
        texts(f"hub:{tmp_path}/saved")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("declared", "/declared: it has several configs: en, fr: write one, as in hub:"),
        ("declared:de", "/declared:de: de is none of its configs, en, fr: write one, as in hub:"),
        ("declared:test", "test is none of its configs, en, fr: write one, as in hub:"),
        ("plain", "/plain: it has several configs: default (all together), en, fr: write one"),
        ("plain:test", "test is none of its configs, default (all together), en, fr: write one"),
        (
            "declared:de:train",
            "'de' not found. Available: ['en', 'fr']): it has the configs en, fr",
        ),
        ("declared:fr:dev", "Unknown split \"dev\". Should be one of ['train', 'test'].)"),
        ("plain:de", "de is none of its configs, default (all together), en, fr: write one"),
        ("plain:fr:dev", "it has the configs default, en, fr; fr has the splits train, test"),
        ("plain:a:b:c", "names no data set: write hub:NAME[:CONFIG][:SPLIT]"),
        ("plain:", "names no data set"),
    ],
)
def test_a_config_or_split_that_is_missing_is_refused_with_those_that_are_there(
    repositories, path, words
):
    with pytest.raises(ConfigError) as error:
        texts(f"hub:{repositories / path}")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_repository_that_cannot_be_parsed_is_a_config_error(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": 5, "b": [')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        texts(f"hub:{tmp_path}")


def test_a_split_of_the_same_data_set_is_held_out(repositories):
    config = DataConfig(path=f"hub:{repositories / 'declared'}:fr", held_out="test")
    (source,) = find_held_out(config)
    assert [row.text for row in read_documents(source, "text")] == ["fr test"]
    assert fingerprint_data(config) != fingerprint_data(DataConfig(path=config.path))


def test_rows_that_changed_are_seen_also_where_small_data_sets_are_held_in_memory(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.IN_MEMORY_MAX_SIZE", 2**30)
    found = set()
    for text in ("one", "other"):
        (tmp_path / "train.jsonl").write_text(json.dumps({"text": text}))
        found.add(fingerprint_data(DataConfig(path=f"hub:{tmp_path}")))
    assert len(found) == 2


def test_a_hub_dataset_is_read_by_name_and_split(monkeypatch):
    def load_dataset(name, config, *, split, **_):
        return datasets.Dataset.from_dict({"text": [name, split, None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    rows = list(read_documents("hub:some/name:test", "text"))
    assert rows[:2] == [
        Document("some/name", "hub:some/name:test:1"),
        Document("test", "hub:some/name:test:2"),
    ]
    assert isinstance(rows[2], BadRow)
    one, other = (DataConfig(path=f"hub:some/{name}") for name in ("name", "other"))
    assert fingerprint_data(one) != fingerprint_data(other)
    assert texts("hub:name") == ["name", "train"]


@pytest.mark.parametrize("error", [ConnectionError, type("OfAnyLibrary", (Exception,), {})])
def test_a_hub_dataset_that_cannot_be_had_is_a_config_error(monkeypatch, error):
    def load_dataset(name, config, *, split, **_):
        raise error("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    with pytest.raises(
        ConfigError,
        match=r"data.path=hub:a/b cannot be loaded \(no network\): .*check NAME, CONFIG and SPLIT",
    ):
        read_documents("hub:a/b", "text")
