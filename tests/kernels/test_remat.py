"""What layers keep for the backward pass, chosen by what fits in memory."""

import pytest

from mixtral_jax.kernels.choose import choose_remat
from mixtral_jax.kernels.remat import choose_fitting, kept_bytes
from tests.cases import small_config


@pytest.mark.parametrize(
    ("memory_bytes", "name"), [(10_000_000, "none"), (3_000_000, "dots"), (1_000, "full")]
)
def test_as_little_as_fits_is_computed_again(memory_bytes, name):
    assert choose_remat(small_config(), memory_bytes).name == name


def test_what_is_asked_for_is_taken_whether_it_fits_or_not():
    assert choose_remat(small_config(model__remat="none"), 1).name == "none"


def test_unknown_memory_is_taken_to_be_little():
    assert choose_remat(small_config(), None).name == "full"


@pytest.mark.parametrize("policy", ["full", "dots", "none"])
def test_what_a_device_keeps_grows_with_its_tokens(policy):
    one, two = (small_config(train__batch_size=size) for size in (8, 16))
    assert kept_bytes(two, policy) == 2 * kept_bytes(one, policy)
    halves = small_config(train__batch_size=16, train__gradient_accumulation=2)
    assert kept_bytes(halves, policy) == kept_bytes(one, policy)
    shared = small_config(train__batch_size=16, mesh__data=2, mesh__expert=1)
    assert kept_bytes(shared, policy) == kept_bytes(one, policy)


def test_the_sum_of_gradients_over_micro_batches_takes_room_too():
    one = small_config(train__batch_size=8)
    two = small_config(train__batch_size=16, train__gradient_accumulation=2)
    sizes = range(1_000_000, 10_000_000, 10_000)
    least = next(size for size in sizes if choose_fitting(one, size) == "none")
    assert choose_fitting(two, least) == "dots"


def test_weights_that_are_gathered_are_kept_too():
    gathered = small_config(mesh__fsdp=2, mesh__expert=1, train__batch_size=16)
    assert kept_bytes(gathered, "none") > kept_bytes(small_config(), "none")
    assert kept_bytes(gathered, "dots") == kept_bytes(small_config(), "dots")
