"""Times reading a prompt and writing after it, in turn with transformers.

Both have the same weights and prompts, and run in the same minutes.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixtral_jax.bench.alternate import alternate
from mixtral_jax.bench.peer import import_peer, make_peer, require_one_device
from mixtral_jax.config import Config
from mixtral_jax.generate.generator import Speed
from mixtral_jax.generate.settings import Settings
from mixtral_jax.pretrained import load_pretrained

ROUNDS, NUM_TOKENS = 3, 32
BATCHES = (1, 8)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One generation: its tokens and its speed.

    Attributes:
        tokens: the tokens that were written, [B, NUM_TOKENS].
        prefill_per_second: tokens of the prompts that were read per second.
        decode_per_second: tokens written per second, without the first of each prompt.
    """

    tokens: np.ndarray
    prefill_per_second: float
    decode_per_second: float


Measure = Callable[[np.ndarray], Timing]


def describe_generate(figures: dict[str, dict[str, float]]) -> str:
    """One line per batch size and program."""
    return "\n".join(
        f"{name}: prefill {rates['prefill']:,.0f} tokens/s, decode {rates['decode']:,.1f} tokens/s"
        for name, rates in figures.items()
    )


def measure_generate(config: Config, mesh: jax.sharding.Mesh) -> dict[str, dict[str, float]]:
    """Measures the tokens per second of both programs, as medians after warming up.

    The prompts have the config's sequence length.

    Raises:
        ConfigError: torch and transformers are not installed, or more than one device was asked
            for.
    """
    require_one_device(mesh, "--generate")
    torch, transformers = import_peer("--generate")
    torch.manual_seed(0)
    theirs = make_peer(config, transformers, eos_token_id=None).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        programs = {
            "mixtral_jax": _run_ours(Path(folder), mesh),
            "transformers": _run_theirs(theirs, torch),
        }
    figures = {}
    for B in BATCHES:
        shape = (B, config.train.sequence_length)
        prompts = np.random.default_rng(B).integers(3, config.model.vocab_size, shape)
        generate = {name: functools.partial(run, prompts) for name, run in programs.items()}
        for name, runs in alternate(generate, ROUNDS, _require_same_tokens).items():
            figures[f"{name}, {B} prompt(s) of {shape[1]} tokens"] = {
                "prefill": runs.median(lambda timing: timing.prefill_per_second),
                "decode": runs.median(lambda timing: timing.decode_per_second),
            }
    return figures


def _require_same_tokens(mine: Timing, other: Timing) -> None:
    assert np.array_equal(mine.tokens, other.tokens), (
        "the programs write different tokens: they do not do the same work"
    )


def _run_ours(folder: Path, mesh: jax.sharding.Mesh) -> Measure:
    loaded = load_pretrained(folder, mesh=mesh)

    def run(prompts: np.ndarray) -> Timing:
        speed = Speed()
        rows = loaded.generator.generate(
            prompts.tolist(), Settings(max_new_tokens=NUM_TOKENS), speed
        )
        prefill = speed.prompt_tokens / speed.prefill_seconds
        return Timing(
            np.array([row.ids for row in rows]), prefill, speed.new_tokens / speed.decode_seconds
        )

    return run


def _run_theirs(model: Any, torch: Any) -> Measure:
    def generate(prompts: np.ndarray, count: int) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        with torch.no_grad():
            ids = model.generate(torch.tensor(prompts), max_new_tokens=count, do_sample=False)
        return ids.numpy()[:, prompts.shape[1] :], time.perf_counter() - start

    def run(prompts: np.ndarray) -> Timing:
        _, first = generate(prompts, 1)
        tokens, whole = generate(prompts, NUM_TOKENS)
        return Timing(
            tokens, prompts.size / first, len(prompts) * (NUM_TOKENS - 1) / (whole - first)
        )

    return run
