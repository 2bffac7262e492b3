"""Paths that users name, by whatever flag, key or function: `~` is their home, a URL is no path."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mixtral_jax
from mixtral_jax.cli import data, export, import_weights
from mixtral_jax.cli.flags import parse_path, parse_run_flags
from mixtral_jax.config import ConfigError, DataConfig, local_path
from mixtral_jax.data.sources import read_rows, require_sources
from mixtral_jax.data.tokenizer import read_tokenizer
from mixtral_jax.runs.base import require_folder
from tests.cases import small_config
from tests.data.chat_cases import train_tokenizer

URLS = [
    "gs://bucket/run",
    "s3://bucket/a/b.jsonl",
    "https://host/x",
    "file:///a/x",
    "gs:/bucket",
]


def parse_flag(name: str) -> Callable[[str], Any]:
    return lambda path: parse_run_flags(
        [f"--{name}={path}"], description="", default_config="pretrain/tiny.py"
    )


READERS: dict[str, Callable[[str], Any]] = {
    "--workdir": parse_flag("workdir"),
    "--config": parse_flag("config"),
    "export --to": lambda path: export.main(["--checkpoint=x", f"--to={path}"]),
    "import --from": lambda path: import_weights.main([f"--from={path}", "--to=x"]),
    "data.path": lambda path: require_sources(DataConfig(path=path)),
    "data.path with weights": lambda path: require_sources(DataConfig(path=f"{path}:2,configs:1")),
    "data.held_out": lambda path: require_sources(DataConfig(held_out=path)),
    "the rows of data.path": lambda path: list(read_rows(path, ["text"])),
    "validate --tokenizer": lambda path: data.main(["validate", "x", f"--tokenizer={path}"]),
    "data.tokenizer": read_tokenizer,
    "finetune.base": lambda path: require_folder(path, "finetune.base"),
    "load_config": mixtral_jax.load_config,
    "load_pretrained": mixtral_jax.load_pretrained,
    "train": lambda path: mixtral_jax.train(small_config(), workdir=path),
}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_url_is_refused_by_name_at_once(read: Callable[[str], Any], url: str) -> None:
    with pytest.raises(ConfigError, match="is a URL") as error:
        read(url)
    assert url in str(error.value)


@pytest.mark.parametrize("path", ["file:///a/x", "file:/x", "FILE:///a"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_url_of_a_file_is_told_to_be_a_path(read: Callable[[str], Any], path: str) -> None:
    with pytest.raises(ConfigError, match=f"{path}.* is a URL: leave out file:"):
        read(path)


def test_the_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a text")
    assert parse_path("~/run") == local_path("~/run", "--workdir") == tmp_path / "run"
    require_sources(DataConfig(path="~/a.txt"))  # It exists.
    assert require_folder("~", "finetune.base") == tmp_path
    train_tokenizer().save(tmp_path / "t.model")
    assert read_tokenizer("~/t.model").fingerprint == train_tokenizer().fingerprint


def test_an_unknown_home_and_an_empty_path_are_refused() -> None:
    for text, words in (("~nobody-of-this-name/x", "does not know"), ("", "is empty")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            parse_path(text)
        with pytest.raises(ConfigError, match=words):
            local_path(text, "--workdir")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_an_unknown_home_is_refused_wherever_a_path_is_read(read: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="a user that this machine does not know"):
        read("~nobody-of-this-name/x")


def test_paths_are_expanded_in_few_places() -> None:
    """Elsewhere, an unknown home would be a stack trace and a URL a folder: see `local_path`."""
    package = Path(mixtral_jax.__file__).parent
    files = (file for file in package.rglob("*.py") if "expanduser" in file.read_text())
    expanding = {str(file.relative_to(package)) for file in files}
    assert expanding == {"config/paths.py", "cli/flags.py", "data/cache.py"}


def test_a_colon_alone_makes_no_url() -> None:
    for text in ("a:b", "C:x", "weights:0.5/part", "hub:name", "./gs:/x"):
        assert local_path(text, "--to") == Path(text)
