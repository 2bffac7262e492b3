"""A folder of made-up programs (ssh, srun, scontrol, gcloud) that comes first on PATH."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


class Kit:
    """Runs a script of launch/ with made-up programs instead of those of a cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()

    def program(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path

    def ends_with(self, *codes: int) -> Path:
        """A program that logs its arguments, and ends with the next of `codes` at each start."""
        return self.program(
            "work",
            f"""
            id=$(printf '%s\\n' "$@" | sed -n 's/^--process_id=//p'); id=${{id:-0}}
            echo "$@" >>"{self.folder}/calls-$id"
            codes=({" ".join(map(str, codes))})
            exit "${{codes[$(wc -l <"{self.folder}/calls-$id") - 1]}}"
        """,
        )

    def calls(self, index: int = 0) -> list[str]:
        path = self.folder / f"calls-{index}"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RESTART_SECONDS": "0",
            **variables,
        }
        return subprocess.Popen(
            [str(LAUNCH / script), *arguments],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **variables)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)
