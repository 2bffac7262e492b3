"""A small ablation as its file describes it, and made-up files of its runs."""

import json
from pathlib import Path
from typing import Any

from mixtral_jax.lab.ablation.definition import Ablation, ArmRun, plan_ablation, read_ablation
from mixtral_jax.lab.ablation.records import DATA, FACTS

MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "dtype": "float32",
}
NUM_STEPS = 20


def small_ablation(**entries: Any) -> Ablation:
    """An ablation of two arms, three seeds and 20 steps; `entries` replace those of its file."""
    defaults: dict[str, Any] = {
        "question": "Is it even?",
        "base": {
            "model": MODEL,
            "train": {"num_steps": NUM_STEPS, "batch_size": 8, "sequence_length": 32},
        },
        "arms": {"none": {"router.load_balance.weight": 0.0}, "some": {}},
        "reference": "some",
        "seeds": (0, 1, 2),
    }
    return plan_ablation(read_ablation(defaults | entries))


def write_run(
    run: ArmRun,
    workdir: Path,
    *,
    loss: float,
    violation: float,
    last_step: int = NUM_STEPS,
    speed: float = 100.0,
    rows: str = "rows",
    imbalance: float = 0.0,
    held_out: float | None = None,
) -> None:
    """Writes the files of a run of `last_step` steps.

    Its loss falls towards `loss` and its maximum violation stays the same; `held_out` is the
    maximum violation on held-out text, by default the same too.
    """
    folder = run.folder(workdir)
    (folder / "checkpoints" / str(last_step)).mkdir(parents=True)
    (folder / FACTS).write_text(
        json.dumps(
            {
                "parameters_total": 1000,
                "parameters_active": 500,
                "model_flops_per_step": 10**9,
                "versions": {"jax": "1.2.3"},
                "commit": None,
                "devices": "1 x cpu",
                "command": ["ablate"],
            }
        )
    )
    (folder / DATA).write_text(json.dumps({"data": "d" * 64, "tokenizer": "t" * 64}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, last_step + 1):
            line = {
                "step": step,
                "loss": loss + 1 / step,
                "tokens": 256 * step,
                "tokens_per_second": speed,
                "batch_hash": f"{rows}-{run.seed}-{step}",
                "router/max_violation": violation,
                "router/running_max_violation": violation / 2,
                "router/device_imbalance": imbalance,
                "router/load_entropy": 0.9,
                "router/dropped_fraction": 0.0,
                "router/dead_experts": 0.0,
                "router/layer_00/load": [0.4, 0.3, 0.2, 0.1],
                "router/layer_01/load": [0.25] * 4,
            }
            if step % 5 == 0:
                line["eval/loss"] = loss + 1 / step
                line["eval/router/max_violation"] = violation if held_out is None else held_out
            file.write(json.dumps(line) + "\n")
