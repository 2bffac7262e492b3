"""What runs on texts say of the sources that they read."""

import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.packing import plan_rows
from mixtral_jax.data.text import prepare_text
from mixtral_jax.runs.text_data import require_every_source


def test_a_source_of_which_everything_is_held_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"the text of {name} says something\n" * 30)
    path = f"{tmp_path}/a.txt:1,{tmp_path}/b.txt:2"
    data = DataConfig(path=path, tokenizer="train:280")
    text = prepare_text(data, 512, tmp_path / "tokenizer.model")
    plan = plan_rows(text.train, 64)
    with pytest.raises(ConfigError) as error:
        require_every_source(path, plan, text.train, text.held_out)
    (held_out,) = (name for name in "ab" if f"/{name}.txt has a weight, and no" in str(error.value))
    assert "all that it holds is held out (1 of" in str(error.value)
    trained = tmp_path / ("b.txt" if held_out == "a" else "a.txt")
    data = DataConfig(path=f"{trained}:1", tokenizer="train:280")
    text = prepare_text(data, 512, tmp_path / "tokenizer.model")
    require_every_source(data.path, plan_rows(text.train, 64), text.train, text.held_out)
