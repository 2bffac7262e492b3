"""Eight virtual CPU devices for every test; silent broadcasts are errors (warnings too: see pyproject.toml)."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
