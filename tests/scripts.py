"""Real runs of the scripts, as other processes: small enough to compile in seconds."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs/pretrain/tiny.py"
TINY_INSTRUCT = ROOT / "configs/instruct/tiny.py"
SMALL = [
    "--config.train.log_every=1",
    "--config.train.batch_size=8",
    "--config.train.sequence_length=32",
    "--config.train.eval_sequences=8",
    "--config.data.tokenizer=train:320",
    "--config.model.vocab_size=320",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1",
    "--config.model.head_dim=16",
]


def write_text(folder: Path) -> Path:
    """400 lines, in `text.txt`."""
    animals = ("fox", "dog", "crow", "cat")
    lines = (f"line {n}: the quick {animals[n % 4]} of {n * n % 97} hills" for n in range(400))
    (folder / "text.txt").write_text("\n".join(lines))
    return folder / "text.txt"


def write_chats(folder: Path) -> Path:
    """300 questions with an answer each, in `chats.jsonl`."""
    animals = ("fox", "dog", "crow", "cat")
    rows = (
        {"prompt": f"{n}: a {animals[n % 4]}?", "completion": f"Quick {animals[n % 4]}."}
        for n in range(300)
    )
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "chats.jsonl"


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a run whose caches of data lie in `folder`.

    XLA_FLAGS and the cache of compiled programs are those of the tests (see conftest.py).
    """
    variables = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return variables | more


def start(
    folder: Path,
    *flags: str,
    program: tuple[str, ...] = (str(ROOT / "train.py"),),
    place: Path | None = None,
    **variables: str,
) -> subprocess.Popen:
    """Starts a run of the small model in the folder `place`; `finish` returns what it prints."""
    command = [
        sys.executable,
        *program,
        f"--config={TINY}",
        *SMALL,
        f"--config.data.path={folder / 'text.txt'}",
    ]
    return subprocess.Popen(
        [*command, *flags],
        cwd=place or folder,
        env=environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_tuning(folder: Path, *flags: str) -> subprocess.Popen:
    """Starts finetune_instruct.py on `chats.jsonl`; without another base, one of 12 steps is
    pretrained on the text.
    """
    chosen = (
        f"--config={TINY_INSTRUCT}",
        f"--config.data.path={folder / 'chats.jsonl'}",
        "--config.mesh.cpu_devices=4",
        f"--config.finetune.pretrain.path={folder / 'text.txt'}",
        "--config.finetune.pretrain.num_steps=12",
        "--config.finetune.pretrain.batch_size=8",
        "--config.train.num_steps=12",
        "--config.train.eval_every=6",
        "--config.train.sequence_length=64",
        "--config.model.num_layers=1",
        "--config.model.num_experts=4",
        "--config.optimizer.learning_rate=0.01",
    )
    return start(folder, *chosen, *flags, program=(str(ROOT / "finetune_instruct.py"),))


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, once the process has ended."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def wait_for_step(process: subprocess.Popen, metrics: Path, step: int) -> None:
    """Returns once the metrics file has a line for `step`."""
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines_of(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl, without the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines
    ]
