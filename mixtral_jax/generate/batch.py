"""Lays prompts out as padded rows, in the few sizes that programs are compiled for."""

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
    """Prompts padded on the left, with empty rows that fill the batch up (length 0).

    `num_slots` is the size of the cache that these prompts and their continuations need.
    """

    tokens_BT: jax.Array
    lengths_B: jax.Array
    num_slots: int


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int) -> None:
    """Checks that the model can read the prompts, and that the context has room to continue them.

    Raises:
        ConfigError: there is no prompt, or one is empty, too long, or has unknown ids.
    """
    require(prompts, "there must be at least one prompt")
    for ids in prompts:
        require(len(ids), "a prompt must have at least one token, such as beginning of text (BOS)")
        low, high = min(ids), max(ids)
        require(
            low >= 0 and high < vocab_size,
            f"a prompt has the id {low if low < 0 else high}, but the ids of this model are 0 to "
            f"{vocab_size - 1}",
        )
        require(
            len(ids) < context,
            f"a prompt has {len(ids)} tokens, which leaves no room in the context of {context}: "
            "shorten it",
        )


def lay_out(
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> Rows:
    """Places the prompts on the mesh. Each process places the rows that its devices hold."""
    T = bucket(max(map(len, prompts)))
    # Each device has a power of two of rows, so that programs for few batch sizes are compiled.
    B = num_rows(len(prompts), mesh, rules)
    tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
    for row, ids in enumerate(prompts):
        tokens_BT[row, T - len(ids) :] = ids
        lengths_B[row] = len(ids)
    num_slots = bucket(T + max(one.max_new_tokens for one in settings))
    return Rows(place(tokens_BT, mesh, rules), place(lengths_B, mesh, rules), num_slots)


def lay_out_sampling(
    settings: Sequence[Settings], mesh: jax.sharding.Mesh, rules: AxisRules
) -> Sampling | None:
    """The sampling settings per row, or None if all rows are greedy (temperature 0).

    Greedy decoding has its own compiled program.
    """
    if all(one.temperature == 0 for one in settings):
        return None
    B = num_rows(len(settings), mesh, rules)

    def column(name: str, dtype: type) -> jax.Array:
        values_B = np.zeros(B, dtype)
        values_B[: len(settings)] = [getattr(one, name) for one in settings]
        return place(values_B, mesh, rules)

    return Sampling(
        column("temperature", np.float32),
        column("top_p", np.float32),
        column("top_k", np.int32),
        column("seed", np.uint32),
    )


def num_rows(num_prompts: int, mesh: jax.sharding.Mesh, rules: AxisRules) -> int:
    """The batch size for some prompts: a power of two per device that holds rows."""
    devices = rules.count_row_devices(mesh)
    return devices << (-(-num_prompts // devices) - 1).bit_length()


def place(array: np.ndarray, mesh: jax.sharding.Mesh, rules: AxisRules) -> jax.Array:
    """Shards the leading dimension of a host array over the devices that hold rows.

    Every process has the whole array, and places the parts of its own devices.
    """
    sharding = jax.NamedSharding(mesh, rules.spec("batch", *(None,) * (array.ndim - 1)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
