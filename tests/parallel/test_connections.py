"""Processes that are slow to compile are not taken for lost."""

import subprocess
import sys

import pytest

from tests.scripts import environment, finish, free_port

# The second process is busy for longer than XLA waits for a connection.
PROGRAM = """
import sys, time
import jax, numpy as np
from mixtral_jax.config import MeshConfig
from mixtral_jax.parallel.connections import connect_processes
from mixtral_jax.parallel.coordinator import Launch
from mixtral_jax.parallel.mesh import make_mesh, use_virtual_cpu_devices
from mixtral_jax.parallel.processes import join_processes

coordinator, index, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with join_processes(Launch(coordinator, 2, index)) as processes:
    use_virtual_cpu_devices(4)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    connect_processes(mesh, processes)
    time.sleep(index * seconds)
    with jax.set_mesh(mesh):
        for axes in ("fsdp", "expert", "tensor", ("fsdp", "expert"), ("fsdp", "expert", "tensor")):
            numbers = np.arange(8.0)
            array = jax.make_array_from_callback(
                (8,), jax.NamedSharding(mesh, jax.P(axes)), lambda index: numbers[index]
            )
            print(float(jax.jit(lambda array: array.sum())(array)))
"""


@pytest.mark.runs
def test_a_process_may_be_busy_for_longer_than_a_connection_waits(tmp_path):
    coordinator = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, coordinator, str(index), "35"],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        code, printed, errors = finish(process)
        assert code == 0, errors
        assert printed.splitlines() == ["28.0"] * 5
