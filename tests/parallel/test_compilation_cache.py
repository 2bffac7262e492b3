"""Where compiled programs are kept, and that the next process loads them."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.runs

PROGRAM = """
import sys
from pathlib import Path
import jax
from mixtral_jax.parallel import compilation_cache

compilation_cache._MIN_COMPILE_SECONDS = 0
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
compilation_cache.keep_compiled_programs(Path(sys.argv[1]))
jax.jit(lambda x: x * 2 + 1)(1.0)
print(sum(event == "/jax/compilation_cache/cache_hits" for event in hits) > 0)
"""


def loads_a_program(folder, **variables):
    """Whether a new process finds its program compiled."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip() == "True"


def test_a_program_is_compiled_once_for_a_kind_of_cpu(tmp_path):
    folder, named = tmp_path / "kept", tmp_path / "named"
    assert not loads_a_program(folder)
    assert loads_a_program(folder)
    (of_this_cpu,) = folder.iterdir()
    of_this_cpu.rename(folder / "of another CPU")
    assert not loads_a_program(folder)

    # A cache that the environment names is used as it is.
    assert not loads_a_program(folder, JAX_COMPILATION_CACHE_DIR=str(named))
    assert len(list(folder.iterdir())) == 2
