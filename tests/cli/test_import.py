"""Importing as a command: by several processes, and of weights that are large."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.checkpoint.export import write_folder
from mixtral_jax.checkpoint.files.stored import DTYPES, Block, StoredArray, shape_of
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS, parameter_chunk, parameter_shape
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.config import ModelConfig
from tests.checkpoint.folders import architecture_of, read_all
from tests.scripts import environment, free_port

GOLDEN = Path(__file__).parents[1] / "golden"
# Imports, and loads what was imported: each process onto its four devices.
PROGRAM = """
import sys
from pathlib import Path
import jax
import numpy as np
from mixtral_jax.checkpoint import on_devices
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.kernels.choose import choose_kernels
from mixtral_jax.runs.import_weights import import_weights
from mixtral_jax.model.transformer import model_maker
from mixtral_jax.parallel.coordinator import Launch
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.parallel.processes import join_processes

address, index = sys.argv[1:3]
source, to = map(Path, sys.argv[3:])
jax.config.update("jax_num_cpu_devices", 4)
with join_processes(Launch(address, 2, int(index))) as processes:
    import_weights(open_weights(source), to, processes)
    processes.share("imported", "")
    weights = open_weights(to)
    with jax.set_mesh(jax.make_mesh((1, 2, 4, 1, 1), MESH_AXES)):
        config = weights.architecture.config(8)
        shapes = jax.eval_shape(model_maker(config, choose_kernels(config, "cpu")))
        on_devices.MAX_BYTES_AT_ONCE = 0
        model = on_devices.load_model(weights.parameters, shapes)
    gate = model.blocks.moe.experts.gate.weight[...]
    expected = weights.parameters["blocks/moe/experts/gate/weight"]
    for shard in gate.addressable_shards:
        parts = zip(shard.index, gate.shape, strict=True)
        block = tuple(slice(*part.indices(size)[:2]) for part, size in parts)
        np.testing.assert_array_equal(shard.data, expected.read(block))
    assert len(gate.addressable_shards) == 4
"""


@pytest.mark.runs
def test_two_processes_import_a_share_each_and_load_what_their_devices_hold(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    address = f"localhost:{free_port()}"
    arguments = [str(GOLDEN / "hf_tiny"), str(tmp_path / "run")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), address, str(index), *arguments],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert sum("imported 480,576 parameters" in output for output, _ in ended) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run"]
    expected = read_all(open_weights(GOLDEN / "hf_tiny"))
    for name, array in read_all(open_weights(tmp_path / "run")).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# --- A checkpoint of the shape of Mixtral 8x7B, with fewer layers ---


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program took."""

    seconds: float
    peak_bytes: int


def write_mixtral(folder: Path) -> int:
    """One layer of Mixtral 8x7B and its embeddings, of noise, in bfloat16; returns the bytes."""
    model = ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=1,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        param_dtype="bfloat16",
    )
    noise = np.random.default_rng(0).normal(size=2**22).astype(ml_dtypes.bfloat16)

    def read_into(block: Block, target: np.ndarray) -> None:
        target[...] = np.resize(noise[sum(part.start for part in block) :], shape_of(block))

    parameters = {
        name: StoredArray(
            parameter_shape(name, model),
            DTYPES["bfloat16"],
            parameter_chunk(name, model),
            read_into,
            name,
        )
        for name in PARAMETERS
    }
    weights = Weights(architecture_of(model), parameters, None, "noise")
    write_folder(weights, folder, "hf", lambda _: None)
    return weights.nbytes


def run(*command: str) -> Cost:
    """The peak is that of the program alone; what wait4 says of it begins with the memory of this
    one.
    """
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) * 1024) if found else peak
            time.sleep(0.01)
    assert process.returncode == 0, command
    return Cost(time.monotonic() - start, peak)


@pytest.mark.full
def test_a_large_import_is_bounded_in_memory_and_takes_less_than_two_copies(tmp_path, capsys):
    """Prints figures: the fastest of five alternations, since other programs only slow down."""
    (tmp_path / "weights").mkdir()
    size = write_mixtral(tmp_path / "weights")

    def import_(folder: Path) -> Cost:
        command = (
            sys.executable,
            "-m",
            "mixtral_jax",
            "import",
            f"--from={folder}",
            f"--to={tmp_path / 'run'}",
        )
        cost = run(*command)
        shutil.rmtree(tmp_path / "run")
        return cost

    copies, starts, imports = [], [], []
    for _ in range(5):
        copies.append(
            run("cp", str(tmp_path / "weights/model.safetensors"), str(tmp_path / "copy"))
        )
        (tmp_path / "copy").unlink()
        starts.append(import_(GOLDEN / "hf_tiny"))
        imports.append(import_(tmp_path / "weights"))
    figures = {
        "gigabytes": size / 1e9,
        "cp_seconds": min(copy.seconds for copy in copies),
        "import_seconds": min(cost.seconds for cost in imports),
        "of_which_start_up": min(cost.seconds for cost in starts),
        "import_peak_gib": max(cost.peak_bytes for cost in imports) / 2**30,
    }
    with capsys.disabled():
        print(json.dumps(figures))
    assert max(cost.peak_bytes for cost in imports) < 1.5 * size + 2**30
    is_quiet = os.getloadavg()[0] < (os.cpu_count() or 1) + 1
    is_fast = figures["import_seconds"] < 2 * figures["cp_seconds"]
    assert is_fast or not is_quiet  # With other work on the cores, times say nothing.
