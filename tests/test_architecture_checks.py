"""The checks of the architecture find what is wrong: each is tried on bad source and on good."""

import pytest

from tests.test_architecture import (
    Check,
    find_collectives,
    find_config_modules,
    find_flags,
    find_forbidden_imports,
    find_jax,
    find_long_code,
    find_missing_docstrings,
    find_platform_checks,
    find_private_jax,
    find_vague_names,
)

IMPORTS = find_forbidden_imports
DOCSTRINGS = find_missing_docstrings


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (IMPORTS, "config", "import mixtral_jax.parallel.mesh"),
        (IMPORTS, "parallel.mesh", "from mixtral_jax.model import moe"),
        (IMPORTS, "data.text", "from mixtral_jax.model.moe import MoE"),
        (IMPORTS, "kernels.attention", "from mixtral_jax.model.layers import rotate"),
        (IMPORTS, "model.moe", "def f():\n    from mixtral_jax.training.loss import cross_entropy"),
        (IMPORTS, "model.moe", "from mixtral_jax import training"),
        (IMPORTS, "model.moe", "import mixtral_jax"),
        (IMPORTS, "model.moe", "from .router import Router"),
        (IMPORTS, "checkpoint.run", "from mixtral_jax.training.state import TrainState"),
        (IMPORTS, "checkpoint.files.stored", "from mixtral_jax.checkpoint.run import find_steps"),
        (IMPORTS, "checkpoint.formats.layouts", "from mixtral_jax.checkpoint import weights"),
        (IMPORTS, "training.step", "from mixtral_jax.model.transformer import Transformer"),
        (IMPORTS, "training.step", "from mixtral_jax.training.loop import TrainLoop"),
        (IMPORTS, "training.loop", "from mixtral_jax.data.batches import TrainBatches"),
        (IMPORTS, "training.loop", "from mixtral_jax.evaluate.perplexity import make_evaluator"),
        (IMPORTS, "evaluate.perplexity", "from mixtral_jax.training.loop import TrainLoop"),
        (IMPORTS, "evaluate.perplexity", "from mixtral_jax.runs.run import Run"),
        (IMPORTS, "lab.ablation.results", "from mixtral_jax.lab.pictures.style import Picture"),
        (IMPORTS, "runs.training", "from mixtral_jax.cli.flags import RunFlags"),
        (IMPORTS, "plan.compile", "from mixtral_jax.runs.run import Run"),
        (IMPORTS, "somewhere.new", "import os"),
        (find_config_modules, "runs.run", "from mixtral_jax.config.mapping import build"),
        (find_collectives, "model.moe", "import jax\njax.lax.psum(1, 'expert')"),
        (find_collectives, "training.step", "from jax.lax import all_gather as gather"),
        (find_platform_checks, "model.moe", "if device.platform == 'tpu': pass"),
        (find_platform_checks, "runs.run", "import jax\njax.default_backend()"),
        (find_vague_names, "model.utils", ""),
        (find_vague_names, "common.names", ""),
        (DOCSTRINGS, "model.moe", "import os"),
        (DOCSTRINGS, "model.moe", "'''Doc.'''\ndef route(): pass"),
        (
            DOCSTRINGS,
            "model.moe",
            "'''Doc.'''\nclass A:\n    '''Doc.'''\n    def f(self): pass",
        ),
        (find_long_code, "model.moe", "\n" * 301),
        (find_long_code, "model.moe", "def f():\n" + "    pass\n" * 60),
        (find_jax, "config", "import jax.numpy as jnp"),
        (find_private_jax, "runs.run", "from jax._src import distributed"),
        (find_flags, "runs.tune", "import argparse"),
    ],
)
def test_a_check_fails_on_bad_source(check: Check, module: str, source: str) -> None:
    assert len(check(f"mixtral_jax.{module}", source)) == 1


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (IMPORTS, "training.step", "from mixtral_jax.model.transformer import ModelOutput"),
        (IMPORTS, "cli.bench", "from mixtral_jax.cli.flags import RunFlags"),
        (IMPORTS, "checkpoint.weights", "from mixtral_jax.checkpoint.files.stored import Block"),
        (find_config_modules, "runs.run", "from mixtral_jax.config import Config"),
        (find_collectives, "model.dispatch.region", "import jax\njax.lax.psum(1, 'expert')"),
        (find_platform_checks, "kernels.attention", "if platform == 'tpu': pass"),
        (DOCSTRINGS, "model.moe", "'''D.'''\ndef _f(): pass\nclass _Rows:\n    def f(self): pass"),
        (find_long_code, "model.moe", "def f():\n" + "    pass\n" * 59),
    ],
)
def test_a_check_passes_good_source(check: Check, module: str, source: str) -> None:
    assert not check(f"mixtral_jax.{module}", source)
