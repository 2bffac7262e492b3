"""The bench verb, on a model small enough to compile in seconds."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_bench_prints_one_json_line_with_its_figures():
    flags = [
        "--config.model.num_layers=1",
        "--config.model.hidden_size=64",
        "--config.train.sequence_length=32",
    ]
    command = [
        sys.executable,
        "-m",
        "mixtral_jax",
        "bench",
        f"--config={ROOT / 'configs/pretrain/tiny.py'}",
        "--json",
    ]
    done = subprocess.run(command + flags, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) >= {
        "tokens_per_second",
        "step_seconds_median",
        "model_flops_per_step",
        "ceiling_flops_per_second",
        "utilization",
        "peak_memory_bytes",
    }
    assert figures["utilization"] > 0
