"""Each key of a config is followed, refused by name, told, or known to have no effect."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.checkpoint.formats.config_keys import KEYS, ROPE_KEYS
from mixtral_jax.checkpoint.formats.huggingface import read_config
from mixtral_jax.checkpoint.formats.mistral import read_params
from mixtral_jax.config import ConfigError
from tests.checkpoint.folders import SMALL, write_config, write_params

GOLDEN = Path(__file__).parents[1] / "golden"
REFUSED = [name for name, key in KEYS.items() if key.fate == "one_of"]


def read(folder: Path, **changes: Any):
    write_config(folder, SMALL, **changes)
    return read_config(folder / "config.json")


def with_null(folder: Path, **changes: Any):
    write_config(folder, SMALL)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return read_config(path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_is_not_computed_here_is_refused_by_name(name, tmp_path):
    for spelling in (name, *KEYS[name].also):
        # In the place of the value that every config has.
        others = {key: None for key in (name, *KEYS[name].also)}
        with pytest.raises(ConfigError, match=f"config.json.* {spelling}='strange' must be"):
            read(tmp_path, **others | {spelling: "strange"})
        for value in KEYS[name].values:
            assert with_null(tmp_path, **{name: value}).notes == ()


@pytest.mark.parametrize(
    ("first", "other"), [(name, also) for name, key in KEYS.items() for also in key.also]
)
def test_both_names_of_a_key_are_read(first, other, tmp_path):
    write_config(tmp_path, SMALL)
    value = json.loads((tmp_path / "config.json").read_text()).get(first, KEYS[first].values[:1])
    value = value[0] if isinstance(value, tuple) else value
    expected = read(tmp_path)
    assert read(tmp_path, **{first: None, other: value}) == expected
    assert read(tmp_path, **{first: value, other: value}) == expected
    with pytest.raises(ConfigError, match=f"{first}=.* and {other}=.* contradict each other"):
        read(tmp_path, **{first: value, other: 77})


def test_layers_must_all_attend_to_the_whole_context(tmp_path):
    full, window = "full_attention", "sliding_attention"
    assert read(tmp_path, layer_types=[full, full]) == read(tmp_path)
    for layers in ([full, window], [window], [full, 3], [[full]]):
        with pytest.raises(ConfigError, match=r"config.json.* layer_types=\[.* must be 'full_att"):
            read(tmp_path, layer_types=layers)


ROPE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a scaling beside the parameters": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        ("rope_scaling.type='linear' must be 'default'", "rope_scaling.factor=4.0"),
    ),
    "a scaling in the parameters": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        ("rope_parameters.rope_type='yarn'", "rope_parameters.factor=4.0"),
    ),
    "a factor alone": ({"rope_scaling": {"factor": 2.0}}, ("rope_scaling.factor=2.0",)),
    "two types in one": (
        {"rope_scaling": {"rope_type": "default", "type": "linear"}},
        ("rope_scaling.rope_type='default' and type='linear' contradict",),
    ),
    "half of each head": (
        {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}},
        ("rope_parameters.partial_rotary_factor=0.5 must be 1.0",),
    ),
    "settings for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e4}}},
        ("rope_parameters.full_attention=",),
    ),
    "a list": ({"rope_scaling": []}, ("rope_scaling=[] must be an object",)),
    "a word": ({"rope_parameters": "default"}, ("rope_parameters='default' must be an object",)),
    "two bases": (
        {"rope_theta": None, "rope_scaling": {"rope_theta": 1e4}},
        ("rope_parameters.rope_theta=50000.0 and rope_scaling.rope_theta=10000.0 contradict",),
    ),
}


@pytest.mark.parametrize("kind", ROPE)
def test_positions_that_are_not_computed_here_are_refused_in_every_place(kind, tmp_path):
    changes, words = ROPE[kind]
    with pytest.raises(ConfigError) as error:
        read(tmp_path, **changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_theta": 5e4, "partial_rotary_factor": 1.0}},
        {"rope_theta": None},
        {"rope_theta": None, "rope_parameters": None, "rope_scaling": {"rope_theta": 5e4}},
    ],
)
def test_positions_may_be_written_in_any_place_if_all_agree(changes, tmp_path):
    assert read(tmp_path, **changes) == read(tmp_path)
    assert set(ROPE_KEYS) == {"rope_type", "rope_theta", "partial_rotary_factor"}


def test_what_nobody_reads_is_told_and_what_has_no_effect_is_not(tmp_path):
    assert read_config(GOLDEN / "hf_tiny" / "config.json").notes == ()
    harmless = {"_name_or_path": "x", "torchscript": False, "use_cache": False, "return_dict": True}
    assert read(tmp_path, **harmless, output_router_logits=True).notes == ()
    strange = {"future": {"a": [1, 2]}, "line\nbreak": 1, "long": "x" * 500}
    (note,) = read(tmp_path, **strange, attention_dropout=0.1).notes
    assert note.isprintable() and len(note) < 300
    for words in ("future={'a': [1, 2]}", "'line\\nbreak'=1", "attention_dropout=0.1"):
        assert words in note
    # A null says nothing.
    assert with_null(tmp_path, future=None).notes == ()


@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_a_window_as_long_as_the_context_is_told_and_a_shorter_one_refused(key, tmp_path):
    def open_with(window):
        if key == "sliding_window":
            return read(tmp_path, sliding_window=window, max_position_embeddings=32_768)
        write_params(tmp_path, SMALL, _sliding_window=window)
        return read_params(tmp_path / "params.json")

    for window in (32_768, 10**6):
        (note,) = open_with(window).notes
        assert f"{key}={window}" in note and "32768" in note
    for window in (32_767, 1, 0, "32768", True, 4e4):
        with pytest.raises(ConfigError, match=rf"{key}={window!r} is shorter .*null only if"):
            open_with(window)


def test_the_other_name_of_a_window_in_params_is_read_too(tmp_path):
    write_params(tmp_path, SMALL, _sliding_window=40_000, sliding_window=4096)
    with pytest.raises(ConfigError, match="_sliding_window=40000 and sliding_window=4096 contra"):
        read_params(tmp_path / "params.json")
    write_params(tmp_path, SMALL, _sliding_window=40_000, sliding_window=40_000)
    assert len(read_params(tmp_path / "params.json").notes) == 1
