"""Prompts as rows of one size, for the bucket that their programs are compiled for."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mixtral_jax.config import require
from mixtral_jax.generate.cache import bucket
from mixtral_jax.generate.sampler import Sampling
from mixtral_jax.generate.settings import Settings
from mixtral_jax.parallel.rules import AxisRules


@dataclasses.dataclass(frozen=True)
class Rows:
    """Prompts padded on the left, and rows without one that fill the batch up; and how many slots
    all will need.
    """

    tokens_BT: jax.Array
    lengths_B: jax.Array
    num_slots: int


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int) -> None:
    """Makes sure that the model can read the prompts, and that there is room to continue them.

    Raises:
        ConfigError: names the rule, the sizes and the fix.
    """
    require(prompts, "there must be at least one prompt")
    for ids in prompts:
        require(
            len(ids), "a prompt must have at least one token, such as the beginning of text (BOS)"
        )
        low, high = min(ids), max(ids)
        require(
            low >= 0 and high < vocab_size,
            f"a prompt has the id {low if low < 0 else high}, but ids of this model run from 0 to "
            f"{vocab_size - 1}",
        )
        require(
            len(ids) < context,
            f"a prompt of {len(ids)} tokens leaves no room in a context of {context}: shorten it",
        )


def lay_out(
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> Rows:
    """The prompts on the mesh; each process places the rows that its devices hold."""
    T = bucket(max(map(len, prompts)))
    # To a power of two on each device, so that few sizes of batch are ever compiled.
    B = num_rows(len(prompts), mesh, rules)
    tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
    for row, ids in enumerate(prompts):
        tokens_BT[row, T - len(ids) :] = ids
        lengths_B[row] = len(ids)
    num_slots = bucket(T + max(asked.max_new_tokens for asked in settings))
    return Rows(place(tokens_BT, mesh, rules), place(lengths_B, mesh, rules), num_slots)


def lay_out_sampling(
    settings: Sequence[Settings], mesh: jax.sharding.Mesh, rules: AxisRules
) -> Sampling | None:
    """How each row draws, or None where all take the likeliest token, for which there is a program
    of its own.
    """
    if all(asked.temperature == 0 for asked in settings):
        return None
    B = num_rows(len(settings), mesh, rules)

    def column(name: str, dtype: type) -> jax.Array:
        values_B = np.zeros(B, dtype)
        values_B[: len(settings)] = [getattr(asked, name) for asked in settings]
        return place(values_B, mesh, rules)

    return Sampling(
        column("temperature", np.float32),
        column("top_p", np.float32),
        column("top_k", np.int32),
        column("seed", np.uint32),
    )


def num_rows(num_prompts: int, mesh: jax.sharding.Mesh, rules: AxisRules) -> int:
    """The least power of two times the devices that hold rows that has room for the prompts."""
    devices = rules.count_row_devices(mesh)
    return devices << (-(-num_prompts // devices) - 1).bit_length()


def place(array: np.ndarray, mesh: jax.sharding.Mesh, rules: AxisRules) -> jax.Array:
    """An array that every process has whole, its leading dimension spread as rows are."""
    sharding = jax.NamedSharding(mesh, rules.spec("batch", *(None,) * (array.ndim - 1)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
