"""What a tuning could not export, or keep on its disk, is refused before its first step."""

import types

import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.runs import tune
from mixtral_jax.runs.base import open_named_base
from tests.cases import make_run, mesh_of, small_config
from tests.checkpoint.folders import random_weights
from tests.checkpoint.side_folders import MODEL, write
from tests.data.test_vocabulary import train


@pytest.mark.parametrize("changes", [{"model_type": "unigram"}, {"byte_fallback": False}])
def test_a_base_whose_tokenizer_cannot_be_exported_is_refused(changes, tmp_path):
    write(tmp_path, {})
    config = small_config(finetune={"base": str(tmp_path)})
    assert open_named_base(config).folder == tmp_path
    train(**changes).save(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match="tokenizer cannot be written for Hugging Face"):
        open_named_base(config)


def test_a_disk_without_room_for_checkpoints_and_export_is_refused(tmp_path, monkeypatch):
    run = make_run(small_config(), mesh_of(), tmp_path)
    weights = random_weights(MODEL, 2, "float32")
    base = types.SimpleNamespace(weights=weights)
    tune._require_room(run, base)
    monkeypatch.setattr(tune, "free_bytes", lambda folder: weights.nbytes)
    with pytest.raises(ConfigError, match=r"too little space .* beside an export .*: free some"):
        tune._require_room(run, base)
