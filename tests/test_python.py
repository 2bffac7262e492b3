"""The Python interface: docs/python.md runs as it stands, and what is wrong is refused by name."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from mixtral_jax.runs.own_data import keep_conversations, keep_texts
from tests.cases import small_config
from tests.scripts import ROOT, environment

PAGE = ROOT / "docs/python.md"


def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    (tmp_path / "page.py").write_text("\n".join(blocks) + "\nprint('ANSWER', repr(answer))\n")
    ran = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "pretraining a base" not in ran.stdout and "ANSWER '" in ran.stdout
    assert (tmp_path / "runs/tuned/export/model.safetensors").exists()


def test_a_config_file_is_loaded_with_keys_changed() -> None:
    config = mixtral_jax.load_config("configs/pretrain/tiny.py", {"train.num_steps": 7})
    assert config.train.num_steps == 7 and config.model.num_experts == 8
    with pytest.raises(ConfigError, match=r"did you mean train.num_steps"):
        mixtral_jax.load_config("configs/pretrain/tiny.py", {"train.num_step": 7})
    with pytest.raises(ConfigError, match="there is no such file"):
        mixtral_jax.load_config("configs/pretrain/nothing.py")


def test_the_same_data_are_kept_once_and_named_by_the_config(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(9)]
    one, other = (keep_texts(iter(texts), small_config(), tmp_path).config for _ in range(2))
    assert one == other and Path(one.data.path).read_text().count("\n") == 9
    changed = keep_texts([*texts, "more"], small_config(), tmp_path).config
    assert changed.data.path != one.data.path


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "data holds no document"),
        (["text", 5], "5 is no text"),
        ([[1, 2], [3.5]], "must be a text, or a list of token ids"),
        ([[1, 2], [96]], "within model.vocab_size=96"),
        ([[1, 2], np.zeros((2, 2), int)], "must be a text, or a list of token ids"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(data, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        keep_texts(data, small_config(), tmp_path)


def test_no_conversations_and_the_wrong_kind_of_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data holds no conversations"):
        keep_conversations([], small_config(), tmp_path)
    with pytest.raises(ConfigError, match="no section finetune"):
        mixtral_jax.tune(small_config(), workdir=tmp_path)
    with pytest.raises(ConfigError, match="has a section finetune"):
        mixtral_jax.train(small_config(finetune={}), workdir=tmp_path)
