"""The Python interface: docs/python.md runs as it stands, and what is wrong is refused by name."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from mixtral_jax.runs.own_data import keep_conversations, keep_documents
from tests.cases import small_config
from tests.scripts import ROOT, environment

PAGE = ROOT / "docs/python.md"


@pytest.mark.runs
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


PROGRAM = """
import os, signal
import jax, optax
import mixtral_jax
from mixtral_jax.config import ConfigError

KEYS = {"train.batch_size": 4, "train.sequence_length": 16, "train.log_every": 1,
        "train.eval_every": 4, "data.tokenizer": "train:280", "model.vocab_size": 280,
        "model.hidden_size": 16, "model.intermediate_size": 16, "model.num_layers": 1,
        "mesh.cpu_devices": 1, "log.tensorboard": False}
texts = [f"number {n} of {n * n % 97}" for n in range(200)]
jax.devices()  # Starts jax, with the one device that the config wants too.

def train(num_steps, **settings):
    keys = KEYS | {"train.num_steps": num_steps}
    config = mixtral_jax.load_config("configs/pretrain/tiny.py", keys)
    return mixtral_jax.train(config, data=iter(texts), **settings)

def stop_after_two(row):
    if row.pop("step") == 2:
        os.kill(os.getpid(), signal.SIGINT)

whole = train(4, workdir="whole", optimizer=optax.lion(0.001))
stopped = train(4, workdir="parts", optimizer=optax.lion(0.001), callbacks=[stop_after_two])
workdir = os.path.abspath("parts")
os.mkdir("elsewhere")
os.chdir("elsewhere")
try:
    train(4, workdir=workdir, optimizer=optax.adam(0.001))
except ConfigError as error:
    refusal = str(error)
resumed = train(4, workdir=workdir, optimizer=optax.lion(0.001))
assert (stopped.outcome, len(stopped.metrics)) == ("stopped", 3)
assert (resumed.outcome, len(resumed.metrics)) == ("finished", 4)
drop = lambda rows: [{key: row[key] for key in row if key != "tokens_per_second"} for row in rows]
assert drop(resumed.metrics) == drop(whole.metrics)
assert "resume with the model and the optimizer" in refusal, refusal
try:
    config = mixtral_jax.load_config("configs/pretrain/tiny.py", KEYS | {"mesh.cpu_devices": 2})
    mixtral_jax.train(config, workdir="more", data=texts)
except ConfigError as error:
    assert "jax has started with 1 already" in str(error)
"""


@pytest.mark.runs
def test_a_run_is_stopped_and_resumed_from_another_folder_bit_for_bit(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout


def test_a_config_file_is_loaded_with_keys_changed() -> None:
    config = mixtral_jax.load_config("configs/pretrain/tiny.py", {"train.num_steps": 7})
    assert config.train.num_steps == 7 and config.model.num_experts == 8
    with pytest.raises(ConfigError, match=r"did you mean train.num_steps"):
        mixtral_jax.load_config("configs/pretrain/tiny.py", {"train.num_step": 7})
    with pytest.raises(ConfigError, match="there is no such file"):
        mixtral_jax.load_config("configs/pretrain/nothing.py")


def test_the_same_data_are_kept_once_and_named_by_the_config(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(9)]
    one, other = (keep_documents(iter(texts), small_config(), tmp_path) for _ in range(2))
    assert one == other and Path(one.data.path).read_text().count("\n") == 9
    changed = keep_documents([*texts, "more"], small_config(), tmp_path)
    assert changed.data.path != one.data.path
    assert sorted(path.suffix for path in (tmp_path / "data").iterdir()) == [".jsonl", ".jsonl"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "data holds no documents"),
        ("one text", "must be many documents"),
        (5, "must be many documents"),
        (["text", 5], "found 5"),
        ([None], "found None"),
        ([[1, 2], [3.5]], "text or a list of token ids"),
        ([[1, 2], np.zeros((2, 2), int)], "text or a list of token ids"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(data, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        keep_documents(data, small_config(), tmp_path)
    assert not list(tmp_path.glob("data/*"))


def test_no_conversations_and_the_wrong_kind_of_config_are_refused(tmp_path: Path) -> None:
    for data, words in (
        ([], "data holds no conversations"),
        (["hi"], "a conversation must be a list of messages"),
        ([[{"role": "user", "content": np.int64(1)}]], "cannot be written as JSON"),
    ):
        with pytest.raises(ConfigError, match=words):
            keep_conversations(data, small_config(), tmp_path)
    with pytest.raises(ConfigError, match="no section finetune"):
        mixtral_jax.tune(small_config(), workdir=tmp_path)
    with pytest.raises(ConfigError, match="has a section finetune"):
        mixtral_jax.train(small_config(finetune={}), workdir=tmp_path)
