"""Help comes at once: nothing heavy is imported before it is needed."""

import json
import subprocess
import sys

import pytest

from mixtral_jax.cli.main import VERBS
from tests.scripts import ROOT, environment

HEAVY = ("jax", "flax", "optax", "orbax", "datasets", "grain", "matplotlib", "tensorstore")
# Runs what its arguments name with --help, then tells which modules that has imported.
PROGRAM = """
import json, runpy, sys
kind, name, *arguments = sys.argv[1:]
sys.argv = [name, *arguments, "--help"]
run = runpy.run_path if kind == "script" else runpy.run_module
try:
    run(name, run_name="__main__")
except SystemExit as end:
    code = end.code or 0
print(json.dumps([code, sorted({module.partition(".")[0] for module in sys.modules})]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ("script", "train.py"),
        ("script", "finetune_instruct.py"),
        ("module", "mixtral_jax"),
        *(("module", "mixtral_jax", verb) for verb in VERBS),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert "usage:" in done.stdout
    assert not set(HEAVY) & set(modules)
