"""Programs may be queued on virtual devices without end: `docs/virtual_devices.md`."""

import os
import re
import subprocess
import sys

import pytest

from tests.scripts import ROOT

(PROGRAM,) = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/virtual_devices.md").read_text(), re.DOTALL
)
BY_JAX = 'jax.config.update("jax_num_cpu_devices", 8)'
BY_US = "from mixtral_jax.parallel.mesh import use_virtual_cpu_devices; use_virtual_cpu_devices(8)"


def run(program: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PJRT_NPROC", "NPROC")
    }
    # XLA gives up after 3 seconds instead of 40.
    timeout = "--xla_cpu_collective_call_terminate_timeout_seconds=3"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "XLA_FLAGS": timeout, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.runs
@pytest.mark.skipif((os.cpu_count() or 1) >= 16, reason="XLA has a thread for each core anyway")
def test_the_program_of_the_page_hangs_as_it_stands():
    ended = run(PROGRAM)
    assert ended.returncode == -6 and "rendezvous" in ended.stderr


@pytest.mark.runs
@pytest.mark.parametrize("given", [{}, {"PJRT_NPROC": "4"}, {"NPROC": "9"}, {"PJRT_NPROC": "many"}])
def test_no_number_of_queued_programs_hangs_our_virtual_devices(given):
    assert BY_JAX in PROGRAM
    ended = run(PROGRAM.replace(BY_JAX, BY_US), **given)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout == "(8, 128, 128)\n"


def test_a_larger_number_of_threads_is_kept(monkeypatch):
    from mixtral_jax.parallel.mesh import use_virtual_cpu_devices

    for given, expected in [({"NPROC": "99"}, "99"), ({"PJRT_NPROC": "77"}, "77"), ({}, "16")]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: 2)
            patch.delenv("PJRT_NPROC", raising=False)
            for name, value in given.items():
                patch.setenv(name, value)
            use_virtual_cpu_devices(8)
            assert os.environ["PJRT_NPROC"] == expected
