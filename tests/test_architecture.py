"""Who may import whom, and where things live, read from the source.

A rule that changes is changed here, on purpose. Each check is a function from (module name, source)
to what is wrong, so that it is tested on bad source too.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
Check = Callable[[str, str], list[str]]

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_CLI_LINES = 2400


def _name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _read_sources(*folders: str) -> dict[str, str]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {_name_of(path): path.read_text() for path in paths}


SOURCES = _read_sources("mixtral_jax")
SCRIPTS = {name: (ROOT / f"{name}.py").read_text() for name in ("train", "finetune_instruct")}

# The other parts of training take the model as an argument: of the model they know only results.
_TRAINING_WHOLES = ("training.assemble", "training.loop")
_TRAINING_PARTS = tuple(
    part
    for name in SOURCES
    if (part := name.removeprefix("mixtral_jax.")).startswith("training.")
    and part not in _TRAINING_WHOLES
)
_RESULT_TYPES = (
    "model.balance",
    "model.routing_metrics",
    "model.router.BalanceBias",
    "model.transformer.ModelOutput",
)
_GROUND = ("config", "parallel", "whole_files")
_MODEL = (*_GROUND, "kernels", "model")
_MIDDLE = (*_MODEL, "data", "finetune", "checkpoint", "generate")
_UPPER = (*_MIDDLE, "training", "pretrained", "evaluate")
# Room -> what it may import besides itself. The longest room that fits a module decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "whole_files": (),
    "config": (),
    "parallel": ("config",),
    "kernels": _GROUND,
    "data": _GROUND,
    "model": _MODEL,
    "finetune": (*_MODEL, "data"),
    # Bytes on disk know nothing of programs, and programs' names nothing of runs.
    "checkpoint.files": _GROUND,
    "checkpoint.formats": (*_MODEL, "data", "checkpoint.files"),
    "checkpoint": (*_MODEL, "data"),
    "generate": (*_MODEL, "data"),
    "training": (),
    **dict.fromkeys(_TRAINING_PARTS, (*_GROUND, *_RESULT_TYPES, *_TRAINING_PARTS)),
    # Batches and evaluation are passed to the loop: it imports neither data nor evaluate.
    "training.loop": (*_GROUND, *_RESULT_TYPES, *_TRAINING_PARTS, "checkpoint.run"),
    # The one place that puts a training together.
    "training.assemble": (*_MODEL, "finetune", *_TRAINING_PARTS),
    "pretrained": _MIDDLE,
    # Held-out loss is the training loss.
    "evaluate": (*_MIDDLE, "pretrained", "training.loss"),
    "lab.ablation": _UPPER,
    "lab.routing": _UPPER,
    "lab.pictures": (*_UPPER, "lab.ablation", "lab.routing"),
    "lab.report": (*_UPPER, "lab.ablation", "lab.routing", "lab.pictures"),
    "lab": (),
    "plan": _UPPER,
    # Its pictures have the style of all others.
    "bench": (*_UPPER, "plan", "lab.pictures.style"),
    "runs": (*_UPPER, "lab", "plan"),
    "cli": (*_UPPER, "lab", "plan", "bench", "runs"),
    "__main__": ("cli.main",),
    "": ("config", "pretrained", "runs.python"),
}


def _is_within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def _room_of(name: str) -> str | None:
    rooms = [room for room in MAY_IMPORT if (_is_within(name, room) if room else not name)]
    return max(rooms, key=len, default=None)


def _imports(source: str) -> Iterator[str]:
    """Dotted names that `source` imports; `from a import b` gives a.b, relative ones stay as is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = f"{'.' * node.level}{node.module or ''}"
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def find_forbidden_imports(module: str, source: str) -> list[str]:
    name = module.removeprefix("mixtral_jax").removeprefix(".")
    room = _room_of(name)
    if room is None:
        return [f"{module} is in no room of MAY_IMPORT"]
    allowed = MAY_IMPORT[room]
    if room and not room.startswith("training"):
        allowed = (room, *allowed)
    wrong = []
    for imported in _imports(source):
        is_ours = _is_within(imported, "mixtral_jax")
        target = imported.removeprefix("mixtral_jax").removeprefix(".")
        is_allowed = any(_is_within(target, other) for other in allowed)
        if imported.startswith(".") or (is_ours and not is_allowed):
            wrong.append(f"{module} imports {imported}")
    return wrong


def find_config_modules(module: str, source: str) -> list[str]:
    """The config is one package with one import."""
    if _is_within(module, "mixtral_jax.config"):
        return []
    modules = {name.rpartition(".")[2] for name in SOURCES if ".config." in name}
    return [
        f"{module} imports {name}: import it from mixtral_jax.config"
        for name in _imports(source)
        if name.startswith("mixtral_jax.config.") and name.split(".")[2] in modules
    ]


# And what starts like one of these, such as psum_scatter.
COLLECTIVES = (
    "all_gather",
    "all_to_all",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "pswapaxes",
    "ragged_all_to_all",
    "unreduced_psum",
)


def find_collectives(module: str, source: str) -> list[str]:
    if _is_within(module, "mixtral_jax.model.dispatch"):
        return []
    used = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    used |= {name.rpartition(".")[2] for name in _imports(source)}
    return [f"{module} uses {name}" for name in sorted(used) if name.startswith(COLLECTIVES)]


PLATFORMS = {"cpu", "gpu", "tpu", "cuda", "rocm"}
# What asks which back end this is, besides kernels/, and why.
MAY_ASK_FOR_THE_PLATFORM = {
    "mixtral_jax.kernels": "chooses by back end",
    "mixtral_jax.plan": "compiles for one that is not here",
    "mixtral_jax.parallel.mesh": "jax splits only a CPU, and only before it starts",
    "mixtral_jax.model.dispatch.ragged_all_to_all": "XLA:CPU lacks the collective",
    "mixtral_jax.parallel.connections": "only on CPUs has a connection 30 seconds",
    "mixtral_jax.parallel.memory": "CPUs do not report their memory",
    "mixtral_jax.training.step": "XLA:CPU leaves temporaries out of its peak memory",
    "mixtral_jax.bench.step": "virtual CPU devices share their cores",
    "mixtral_jax.runs.describe": "says that CPU devices are virtual",
    "mixtral_jax.runs.checkup": "finds accelerators that jax does not use",
}


def find_platform_checks(module: str, source: str) -> list[str]:
    if any(_is_within(module, room) for room in MAY_ASK_FOR_THE_PLATFORM):
        return []
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            values = [node.left, *node.comparators]
            constants = {value.value for value in values if isinstance(value, ast.Constant)}
            if constants & PLATFORMS:
                wrong.append(f"{module}:{node.lineno} compares with a platform")
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in ("platform_dependent", "default_backend"):
                wrong.append(f"{module}:{node.lineno} uses {name}")
    return wrong


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

    visit(module, [node for node in tree.body if not _is_private_class(node)])
    return missing


def _is_private_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and node.name.startswith("_")


def find_long_code(module: str, source: str) -> list[str]:
    num_lines = source.count("\n")
    wrong = [f"{module} has {num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                wrong.append(f"{module}.{node.name} has {num_lines} lines")
    return wrong


def find_jax(module: str, source: str) -> list[str]:
    """Config files and the config are read where no back end is wanted."""
    if not _is_within(module, "mixtral_jax.config"):
        return []
    heavy = ("jax", "flax", "optax", "orbax")
    return [f"{module} imports {name}" for name in _imports(source) if name.split(".")[0] in heavy]


def find_private_jax(module: str, source: str) -> list[str]:
    """jax._src may change with any release: one file knows what it needs of it."""
    if module == "mixtral_jax.parallel.processes":
        return []
    return [f"{module} imports {name}" for name in _imports(source) if _is_within(name, "jax._src")]


def find_flags(module: str, source: str) -> list[str]:
    if _is_within(module, "mixtral_jax.cli"):
        return []
    readers = ("argparse", "absl")
    return [
        f"{module} imports {name}" for name in _imports(source) if name.split(".")[0] in readers
    ]


def _everywhere(check: Check, sources: dict[str, str] = SOURCES) -> list[str]:
    return [wrong for module, source in sources.items() for wrong in check(module, source)]


def test_no_room_imports_one_above_it() -> None:
    assert not _everywhere(find_forbidden_imports)


def test_the_config_has_one_import() -> None:
    assert not _everywhere(find_config_modules)


def test_collectives_appear_in_dispatch_only() -> None:
    assert not _everywhere(find_collectives)


def test_only_kernels_choose_by_back_end() -> None:
    assert not _everywhere(find_platform_checks)


def test_no_file_has_a_vague_name() -> None:
    assert not _everywhere(find_vague_names)


def test_everything_public_has_a_docstring() -> None:
    assert not _everywhere(find_missing_docstrings)


def test_files_and_functions_are_short() -> None:
    assert not _everywhere(find_long_code, SOURCES | SCRIPTS | _read_sources("tests", "configs"))


def test_the_command_line_is_short() -> None:
    lines = sum(source.count("\n") for name, source in SOURCES.items() if ".cli" in name)
    assert lines < MAX_CLI_LINES
    assert all(source.count("\n") < 60 for source in SCRIPTS.values())


def test_the_config_knows_no_jax() -> None:
    assert not _everywhere(find_jax)


def test_jax_is_used_by_its_public_names() -> None:
    assert not _everywhere(find_private_jax)


def test_only_the_command_line_reads_flags() -> None:
    assert not _everywhere(find_flags)
