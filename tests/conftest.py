"""Eight virtual CPU devices for every test; silent broadcasts are errors (warnings too: see
pyproject.toml).
"""

import importlib.metadata
import os

# Most of a test's time is compiling: XLA does a third of the work with these, and the same
# arithmetic. The runs in tests/training/test_resume.py go without them, as users' runs do.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith(
    "0.10."
):  # Later ones end the process at a flag they lack.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
