"""A base is opened with its notes; what a tuning could not export or keep is refused at once."""

import contextlib
import dataclasses
import types
from typing import Any

import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs import tune
from mixtral_jax.runs.base import open_named_base
from mixtral_jax.runs.checkup import fit_base
from mixtral_jax.runs.upcycle import open_dense
from tests.cases import make_run, mesh_of, small_config
from tests.checkpoint.folders import random_weights
from tests.checkpoint.side_folders import MODEL, write
from tests.data.test_vocabulary import train


@pytest.mark.parametrize("changes", [{"model_type": "unigram"}, {"byte_fallback": False}])
def test_a_base_whose_tokenizer_cannot_be_exported_is_refused(changes, tmp_path):
    write(tmp_path, {})
    config = small_config(finetune={"base": str(tmp_path)})
    assert open_named_base(config, is_shown=False).folder == tmp_path
    train(**changes).save(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match="tokenizer cannot be written for Hugging Face"):
        open_named_base(config, is_shown=False)


@pytest.mark.parametrize("index", [0, 1])
def test_each_way_to_open_a_base_prints_its_notes_in_one_process(index, tmp_path, capsys):
    write(tmp_path, {"generation_config.json": {"temperature": 0.6}})
    tuning = small_config(finetune={"base": str(tmp_path)})
    run = make_run(small_config(upcycle={"base": str(tmp_path)}), mesh_of(), tmp_path)
    run = dataclasses.replace(run, processes=Processes(index))
    stop: Any = None
    for open_it in (
        lambda: tune.find_base(tuning, tmp_path, run.processes, stop),
        lambda: fit_base(tuning, [], is_shown=run.is_writer),
        lambda: open_dense(run),
    ):
        with contextlib.suppress(ConfigError):  # It is no dense model.
            open_it()
        assert capsys.readouterr().err.count("temperature=0.6") == (index == 0)


def test_a_disk_without_room_for_checkpoints_and_export_is_refused(tmp_path, monkeypatch):
    run = make_run(small_config(), mesh_of(), tmp_path)
    weights = random_weights(MODEL, 2, "float32")
    base = types.SimpleNamespace(weights=weights)
    tune._require_room(run, base)
    monkeypatch.setattr(tune, "free_bytes", lambda folder: weights.nbytes)
    with pytest.raises(ConfigError, match=r"too little space .* beside an export .*: free some"):
        tune._require_room(run, base)
