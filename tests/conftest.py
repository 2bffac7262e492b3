"""Eight virtual CPU devices for every test; silent broadcasts are errors (warnings too: see
pyproject.toml).
"""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Most of a test's time is tracing and compiling. XLA does a third of the work with these flags, and
# the same arithmetic. The runs in tests/training/test_resume.py go without them, as users' runs do.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
# A later jaxlib that lacks one of these would end the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# Each operation of a program carries the Python frames it was traced in through all passes of XLA.
# No test looks at them, and they take a tenth of the time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# Programs that one worker has compiled, it and the processes that it starts load from here. Each
# worker has a folder of its own, since jax does not write these files in one go.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mixtral_jax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

from mixtral_jax.parallel.mesh import use_virtual_cpu_devices
from tests.scripts import write_text

jax.config.update("jax_platforms", "cpu")
use_virtual_cpu_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects and few cycles. Collecting garbage after every 700 of them, Python's
# default, takes a fifth of the time.
gc.set_threshold(100_000, 50, 100)

# Files that take long come first, so that at the end no worker waits for another.
LONG_FILES = (
    "test_mesh_invariance",
    "test_router_options",
    "test_processes",
    "test_finetune_instruct",
    "test_ablate",
    "test_resume",
    "test_upcycled_run",
    "test_asking",
    "test_balance_mechanism",
    "test_balance_scopes",
    "test_step",
    "test_analyze",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a text; runs and their caches live beside it."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
