"""Which implementation runs on which back end, and what is refused."""

from typing import get_args

import pytest

from mixtral_jax.config import ConfigError, TransportName
from mixtral_jax.kernels import choose
from mixtral_jax.kernels.choose import (
    Kernels,
    choose_attention,
    choose_grouped_matmul,
    choose_kernels,
    choose_remat,
    choose_transport,
)
from mixtral_jax.model.dispatch.transports import TRANSPORTS
from tests.cases import small_config


def grouped_matmul_of(requested, platform, monkeypatch=None, installed=False):
    if monkeypatch:
        find = lambda platform: "" if installed else "the package tokamax"  # noqa: E731
        monkeypatch.setattr(choose.tokamax, "find_obstacle", find)
    return choose_grouped_matmul(small_config(dispatch__grouped_matmul=requested), platform)


@pytest.mark.parametrize(
    ("platform", "installed", "name"),
    [
        ("cpu", False, "blocks"),
        ("tpu", True, "ragged_dot"),
        ("gpu", True, "tokamax"),
        ("gpu", False, "blocks"),
    ],
)
def test_auto_takes_a_grouped_kernel_everywhere(monkeypatch, platform, installed, name):
    assert grouped_matmul_of("auto", platform, monkeypatch, installed).name == name


def test_a_dense_lowering_is_never_silent(monkeypatch):
    assert "every row by every expert" in str(grouped_matmul_of("ragged_dot", "gpu"))
    with pytest.raises(ConfigError, match="tokamax needs a TPU or an NVIDIA GPU"):
        grouped_matmul_of("tokamax", "cpu")
    assert "tokamax" in grouped_matmul_of("auto", "gpu", monkeypatch).why


@pytest.mark.parametrize(
    ("platform", "expert", "name"),
    [
        ("cpu", 8, "all_gather"),
        ("tpu", 8, "ragged_all_to_all"),
        ("gpu", 8, "ragged_all_to_all"),
        ("tpu", 2, "all_gather"),
        ("tpu", 1, "all_gather"),
    ],
)
def test_auto_takes_the_transport_that_moves_least_where_it_works(platform, expert, name):
    assert choose_transport(small_config(mesh__expert=expert), platform).name == name


def test_ragged_all_to_all_over_too_many_gpus_is_refused_and_on_cpu_says_what_it_is():
    config = small_config(
        mesh__expert=64, model__num_experts=64, dispatch__transport="ragged_all_to_all"
    )
    with pytest.raises(ConfigError, match=r"mesh\.expert=64"):
        choose_transport(config, "gpu")
    assert "stands in" in choose_transport(config, "cpu").why


def test_every_transport_that_the_config_names_exists():
    assert set(TRANSPORTS) == set(get_args(TransportName))


@pytest.mark.parametrize(
    ("platform", "head_dim", "length", "name"),
    [
        ("tpu", 128, 4096, "splash"),
        ("tpu", 64, 4096, "xla"),
        ("tpu", 128, 100, "xla"),
        ("gpu", 128, 4096, "xla"),
    ],
)
def test_flash_attention_is_taken_where_it_fits(platform, head_dim, length, name):
    config = small_config(model__head_dim=head_dim, train__sequence_length=length)
    assert choose_attention(config, platform).name == name


def test_flash_attention_that_does_not_fit_is_refused():
    config = small_config(model__attention="splash", train__sequence_length=4096)
    with pytest.raises(ConfigError, match=r"model\.attention=splash needs a TPU"):
        choose_attention(config, "cpu")


def test_one_record_holds_all_choices_with_their_reasons():
    config = small_config(mesh__expert=8)
    kernels = choose_kernels(config, "tpu")
    assert kernels == Kernels(
        choose_attention(config, "tpu"),
        choose_grouped_matmul(config, "tpu"),
        choose_transport(config, "tpu"),
        choose_remat(config, None),
    )
    assert str(kernels.transport) == "ragged_all_to_all (moves 4 times fewer rows than all_gather)"
