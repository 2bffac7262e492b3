"""Which implementation runs on which back end, and what is refused."""

import pytest

from mixtral_jax.config import ConfigError, DispatchConfig
from mixtral_jax.kernels import grouped_matmul
from mixtral_jax.kernels.attention import choose_attention
from mixtral_jax.kernels.grouped_matmul import choose_kernel
from mixtral_jax.model.dispatch.choose import choose_transport
from tests.cases import small_config


def kernel_of(asked, platform, monkeypatch=None, installed=False):
    if monkeypatch:
        find = lambda platform: "" if installed else "the package tokamax"  # noqa: E731
        monkeypatch.setattr(grouped_matmul.tokamax, "find_obstacle", find)
    return choose_kernel(DispatchConfig(grouped_matmul=asked), platform)


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
    assert kernel_of("auto", platform, monkeypatch, installed).name == name


def test_a_dense_lowering_is_never_silent(monkeypatch):
    assert "every row by every expert" in str(kernel_of("ragged_dot", "gpu"))
    with pytest.raises(ConfigError, match="tokamax needs a TPU or an NVIDIA GPU"):
        kernel_of("tokamax", "cpu")
    assert "tokamax" in kernel_of("auto", "gpu", monkeypatch).why


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
    assert (
        choose_attention(small_config(model__head_dim=head_dim).model, length, platform).name
        == name
    )


def test_flash_attention_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"model\.attention=splash needs a TPU"):
        choose_attention(small_config(model__attention="splash").model, 4096, "cpu")
