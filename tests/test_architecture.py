"""Who may import whom, and where things live, read from the source. A rule that changes is changed
here, on purpose.

Each check is a function from (module name, source) to what is wrong, so that it is tested on bad
source too.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Check = Callable[[str, str], list[str]]


def _name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    _name_of(path): path.read_text() for path in sorted((ROOT / "mixtral_jax").rglob("*.py"))
}

# The parts of training that the loop composes, which take the model as an argument: of the model
# they know results.
_TRAIN_PARTS = tuple(
    f"train.{name}" for name in ("loss", "optimizer", "state", "step", "metrics", "console")
)
_RESULT_TYPES = (
    "model.balance",
    "model.routing_metrics",
    "model.router.Routing",
    "model.router.BalanceBias",
    "model.transformer.ModelOutput",
)
_GROUND = ("config", "config_mapping", "parallel")
_MODEL = (*_GROUND, "kernels", "model")
_MIDDLE = (*_MODEL, "data", "finetune", "checkpoint", "generate")
_UPPER = (*_MIDDLE, "train", "pretrained", "evaluate")
# Room -> what it may import besides itself. The longest room that fits a module decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # Split by size: what is used of them is imported from `config`.
    "config_errors": (),
    "config_finetune": ("config_errors",),
    "config_model": ("config_errors",),
    "config_router": ("config_errors",),
    "config_upcycle": ("config_errors", "config_finetune", "config_model", "config_router"),
    "config": (
        "config_errors",
        "config_finetune",
        "config_model",
        "config_router",
        "config_upcycle",
    ),
    "config_mapping": ("config",),
    "parallel": ("config",),
    "kernels": _GROUND,
    "data": _GROUND,
    "model": (*_MODEL, "config_router"),
    "finetune": (*_MODEL, "data"),
    "checkpoint": (*_MODEL, "data"),
    "generate": (*_MODEL, "data"),
    "train": (),
    **dict.fromkeys(_TRAIN_PARTS, (*_GROUND, *_RESULT_TYPES, *_TRAIN_PARTS)),
    # Batches and evaluation are passed to the loop: it imports neither data nor evaluate.
    "train.loop": (*_GROUND, *_RESULT_TYPES, *_TRAIN_PARTS, "checkpoint.run"),
    "pretrained": _MIDDLE,
    # Held-out loss is the training loss.
    "evaluate": (*_MIDDLE, "pretrained", "train.loss"),
    "lab": _UPPER,
    "plan": _UPPER,
    "cli": (*_UPPER, "lab", "plan"),
    "__main__": ("cli.main",),
    "": ("pretrained",),
}


def _is_within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def _room_of(name: str) -> str | None:
    rooms = [room for room in MAY_IMPORT if (_is_within(name, room) if room else not name)]
    return max(rooms, key=len, default=None)


def _imports(source: str) -> Iterator[str]:
    """Dotted names that `source` imports; those of `from a import b` as a.b, relative ones as they
    stand.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )


def find_forbidden_imports(module: str, source: str) -> list[str]:
    name = module.removeprefix("mixtral_jax").removeprefix(".")
    room = _room_of(name)
    if room is None:
        return [f"{module} is in no room of MAY_IMPORT"]
    # The modules of `train` differ in what they may import, those of other rooms do not.
    allowed = (
        MAY_IMPORT[room] if room.startswith("train") or not room else (room, *MAY_IMPORT[room])
    )
    wrong = []
    for imported in _imports(source):
        is_ours = _is_within(imported, "mixtral_jax")
        target = imported.removeprefix("mixtral_jax").removeprefix(".")
        if imported.startswith(".") or (
            is_ours and not any(_is_within(target, other) for other in allowed)
        ):
            wrong.append(f"{module} imports {imported}")
    return wrong


COLLECTIVES = {
    "all_gather",
    "all_gather_invariant",
    "all_gather_reduced",
    "all_to_all",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_invariant",
    "psum_scatter",
    "pswapaxes",
    "ragged_all_to_all",
    "unreduced_psum",
}


def find_collectives(module: str, source: str) -> list[str]:
    if _is_within(module, "mixtral_jax.model.dispatch"):
        return []
    used = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    used |= {name.rpartition(".")[2] for name in _imports(source)}
    return [f"{module} uses {name}" for name in sorted(used & COLLECTIVES)]


def find_vague_names(module: str, source: str) -> list[str]:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"} & set(module.split("."))
    return [f"{module} is named {name}: name the thing" for name in sorted(vague)]


def find_missing_docstrings(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else [module]

    def visit(parent: str, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    missing.append(f"{parent}.{node.name}")
                if isinstance(node, ast.ClassDef):
                    visit(f"{parent}.{node.name}", node.body)

    visit(module, tree.body)
    return missing


def find_jax(module: str, source: str) -> list[str]:
    """Config files and the config are read where no back end is wanted."""
    heavy = [
        name for name in _imports(source) if name.split(".")[0] in ("jax", "flax", "optax", "orbax")
    ]
    return (
        [f"{module} imports {name}" for name in heavy]
        if module.startswith("mixtral_jax.config")
        else []
    )


def find_private_jax(module: str, source: str) -> list[str]:
    """jax._src may change with any release: one file knows what it needs of it."""
    if module == "mixtral_jax.parallel.processes":
        return []
    return [f"{module} imports {name}" for name in _imports(source) if _is_within(name, "jax._src")]


def find_flags(module: str, source: str) -> list[str]:
    if _is_within(module, "mixtral_jax.cli"):
        return []
    return [
        f"{module} imports {name}"
        for name in _imports(source)
        if name.split(".")[0] in ("argparse", "absl")
    ]


def _everywhere(check: Check) -> list[str]:
    return [wrong for module, source in SOURCES.items() for wrong in check(module, source)]


def test_no_room_imports_one_above_it() -> None:
    assert not _everywhere(find_forbidden_imports)


def test_collectives_appear_in_dispatch_only() -> None:
    assert not _everywhere(find_collectives)


def test_no_file_has_a_vague_name() -> None:
    assert not _everywhere(find_vague_names)


def test_everything_public_has_a_docstring() -> None:
    assert not _everywhere(find_missing_docstrings)


def test_the_config_knows_no_jax() -> None:
    assert not _everywhere(find_jax)


def test_jax_is_used_by_its_public_names() -> None:
    assert not _everywhere(find_private_jax)


def test_only_the_command_line_reads_flags() -> None:
    assert not _everywhere(find_flags)


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (find_forbidden_imports, "config", "import mixtral_jax.parallel.mesh"),
        (find_forbidden_imports, "parallel.mesh", "from mixtral_jax.model import moe"),
        (find_forbidden_imports, "data.text", "from mixtral_jax.model.moe import MoE"),
        (
            find_forbidden_imports,
            "kernels.attention",
            "from mixtral_jax.model.layers import rotate",
        ),
        (
            find_forbidden_imports,
            "model.moe",
            "def f():\n    from mixtral_jax.train.loss import cross_entropy",
        ),
        (find_forbidden_imports, "model.moe", "from mixtral_jax import train"),
        (find_forbidden_imports, "model.moe", "import mixtral_jax"),
        (find_forbidden_imports, "model.moe", "from .router import Router"),
        (
            find_forbidden_imports,
            "checkpoint.run",
            "from mixtral_jax.train.state import TrainState",
        ),
        (
            find_forbidden_imports,
            "train.step",
            "from mixtral_jax.model.transformer import Transformer",
        ),
        (find_forbidden_imports, "train.step", "from mixtral_jax.train.loop import TrainLoop"),
        (find_forbidden_imports, "train.loop", "from mixtral_jax.data.batches import TrainBatches"),
        (
            find_forbidden_imports,
            "train.loop",
            "from mixtral_jax.evaluate.perplexity import make_evaluator",
        ),
        (
            find_forbidden_imports,
            "evaluate.perplexity",
            "from mixtral_jax.train.loop import TrainLoop",
        ),
        (find_forbidden_imports, "evaluate.perplexity", "from mixtral_jax.runs.run import Run"),
        (find_forbidden_imports, "plan.compile", "from mixtral_jax.cli.flags import RunFlags"),
        (find_forbidden_imports, "somewhere.new", "import os"),
        (find_collectives, "model.moe", "import jax\njax.lax.psum(1, 'expert')"),
        (find_collectives, "train.step", "from jax.lax import all_gather as gather"),
        (find_vague_names, "model.utils", ""),
        (find_vague_names, "common.names", ""),
        (find_missing_docstrings, "model.moe", "import os"),
        (find_missing_docstrings, "model.moe", "'''Doc.'''\ndef route(): pass"),
        (
            find_missing_docstrings,
            "model.moe",
            "'''Doc.'''\nclass Router:\n    '''Doc.'''\n    def route(self): pass",
        ),
        (find_jax, "config", "import jax.numpy as jnp"),
        (find_private_jax, "cli.start", "from jax._src import distributed"),
        (find_flags, "train.loop", "import argparse"),
    ],
)
def test_a_check_fails_on_bad_source(check: Check, module: str, source: str) -> None:
    assert len(check(f"mixtral_jax.{module}", source)) == 1


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (
            find_forbidden_imports,
            "train.step",
            "from mixtral_jax.model.transformer import ModelOutput",
        ),
        (find_forbidden_imports, "cli.bench", "from mixtral_jax.cli.flags import RunFlags"),
        (find_collectives, "model.dispatch.region", "import jax\njax.lax.psum(1, 'expert')"),
        (
            find_missing_docstrings,
            "model.moe",
            "'''Doc.'''\ndef _sort(): pass\nclass _Rows:\n    def sort(self): pass",
        ),
    ],
)
def test_a_check_passes_good_source(check: Check, module: str, source: str) -> None:
    assert not check(f"mixtral_jax.{module}", source)
