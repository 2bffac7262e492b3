"""Help comes at once: nothing heavy is imported before it is needed."""

import json
import subprocess
import sys

from mixtral_jax.cli.main import VERBS
from tests.scripts import ROOT, environment

# All packages that help may import, besides Python's own. None takes more than a tenth of a second.
LIGHT = {"mixtral_jax", "configs", "numpy", "ml_dtypes", "rich", "pygments", "sentencepiece"}
COMMANDS = [["train.py"], ["finetune_instruct.py"], ["mixtral_jax"], ["mixtral_jax.cli.main"]]
COMMANDS += [["mixtral_jax", verb] for verb in VERBS]
COMMANDS += [["mixtral_jax", "data", verb] for verb in ("inspect", "validate")]
# Prints, for each command, what its help writes and which modules that has imported.
PROGRAM = """
import contextlib, io, json, runpy, sys

found = []
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments, "--help"]
    before, output = set(sys.modules), io.StringIO()
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        run(name, run_name="__main__")
    imported = {module.partition(".")[0] for module in set(sys.modules) - before}
    found.append([output.getvalue(), sorted(imported)])
print(json.dumps(found))
"""


def test_help_of_every_command_imports_light_packages_alone(tmp_path):
    command = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    for command, (text, imported) in zip(COMMANDS, json.loads(done.stdout), strict=True):
        assert "usage: " in text, command
        assert set(imported) - LIGHT - sys.stdlib_module_names == set(), command
