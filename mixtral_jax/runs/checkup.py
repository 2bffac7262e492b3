"""What would go wrong in a run, found before it starts: problems with their fixes."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.data.cache import default_cache_dir
from mixtral_jax.data.sources import require_sources
from mixtral_jax.data.tokenizer import check_vocabulary, load_tokenizer
from mixtral_jax.parallel.agreement import Member
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.schedulers import Scheduler
from mixtral_jax.runs.base import open_named_base, require_tunable
from mixtral_jax.runs.console import in_gib
from mixtral_jax.runs.run import require_trainable
from mixtral_jax.runs.workdir import NEEDED, not_writable, require_seen_by_all
from mixtral_jax.training.assemble import Training

# Patterns of the device files of NVIDIA GPUs and Cloud TPUs, and the extra whose jax uses them.
_DEVICE_FILES = {"nvidia[0-9]*": "cuda", "accel[0-9]*": "tpu", "vfio/[0-9]*": "tpu"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What would go wrong, and what to do about it."""

    what: str
    fix: str


def check_launch(processes: Processes, scheduler: Scheduler | None) -> list[Problem]:
    """Finds that fewer processes met than the scheduler started."""
    missing = scheduler and scheduler.describe_missing(processes.count)
    return [Problem(missing, scheduler.fix)] if scheduler and missing else []


def check_accelerators(
    platform: str,
    num_local: int,
    is_alone_on_host: bool,
    environment: Mapping[str, str],
    root: Path = Path("/dev"),
) -> list[Problem]:
    """Finds accelerators of this machine that jax does not use: all of them, or some.

    Args:
        num_local: devices of this process.
        root: where device files are.
    """
    files = {pattern: len(list(root.glob(pattern))) for pattern in _DEVICE_FILES}
    if platform == "cpu" and not environment.get("JAX_PLATFORMS"):
        unused = [pattern for pattern, count in files.items() if count]
        return [
            Problem(
                f"jax uses the CPU, though {root}/{pattern} is there",
                f"pip install -e '.[{_DEVICE_FILES[pattern]}]'",
            )
            for pattern in unused[:1]
        ]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    num_gpus = files["nvidia[0-9]*"]
    if visible is not None:
        num_gpus = len([device for device in visible.split(",") if device])
    if platform == "gpu" and is_alone_on_host and num_local < num_gpus:
        what = f"the only process of this host uses {num_local} of its {num_gpus} GPUs"
        fix = "set JAX_LOCAL_DEVICE_IDS=0,1,... for all of them, or start a process for each"
        return [Problem(what, fix)]
    return []


def check_data(config: Config) -> list[Problem]:
    """Finds problems with text, tokenizer and cache, without reading all of the text."""
    problems = []
    for check in (_open_source, _open_tokenizer):
        try:
            check(config)
        except ConfigError as error:
            problems.append(as_problem(error, "see docs/data.md"))
    reason = why_not_writable(default_cache_dir())
    if reason:
        what = f"the cache cannot be written ({reason})"
        problems.append(Problem(what, "set XDG_CACHE_HOME to a folder that can be"))
    return problems


def _open_source(config: Config) -> None:
    require_sources(config.data, with_hub=False)


def _open_tokenizer(config: Config) -> None:
    if not config.data.tokenizer.startswith("train:"):  # That one is yet to be trained.
        nowhere = Path(tempfile.gettempdir()) / "mixtral_jax-no-tokenizer-here"
        tokenizer = load_tokenizer(config.data.tokenizer, lambda: (), nowhere, may_save=False)
        check_vocabulary(tokenizer, config.model.vocab_size, is_planned=True)


def fit_base(config: Config, problems: list[Problem], *, is_shown: bool) -> Config:
    """The config of a tuning with the shape of the base, if it names one.

    Adds to `problems` what is wrong with the config or with the base.

    Args:
        is_shown: whether this process prints the notes on the base.
    """
    try:
        require_trainable(config)
        if config.finetune is None:
            return config
        if config.finetune.base is not None:
            return open_named_base(config, is_shown=is_shown).fit(config)
        require_tunable(config)
    except ConfigError as error:
        problems.append(as_problem(error, "name another in finetune.base"))
    return config


def check_workdir(
    workdir: Path | None, processes: Processes, members: Sequence[Member]
) -> list[Problem]:
    """Finds that process 0 cannot write the workdir, or that not all processes see it.

    All processes must call this.
    """
    if any(member.workdir is None for member in members):
        return [as_problem(ConfigError(NEEDED))] if processes.count > 1 else []
    assert workdir is not None
    is_new = not workdir.exists()
    own_reason = why_not_writable(workdir) if processes.index == 0 else ""
    reason = processes.share("workdir writable", own_reason)[0]
    if reason:
        return [as_problem(not_writable(workdir, reason))]
    try:
        require_seen_by_all(workdir, processes)
    except ConfigError as error:
        return [as_problem(error)]
    finally:
        if processes.index == 0 and is_new:
            workdir.rmdir()  # A check leaves nothing behind.
    return []


def as_problem(error: ConfigError, fix: str = "") -> Problem:
    """An error as a problem: our errors are what is wrong, a colon, and the fix.

    Args:
        fix: for an error that names none.
    """
    what, _, own_fix = str(error).partition(": ")
    return Problem(what, own_fix or fix)


def why_not_writable(folder: Path) -> str:
    """The reason why no file can be made in `folder`; empty if one can.

    The folder is made if it is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or will be."""
    places = (folder, *folder.absolute().parents)
    return shutil.disk_usage(next(place for place in places if place.exists())).free


def check_disk(training: Training, workdir: Path) -> list[Problem]:
    """Finds that the disk has no room for what a run still has to write.

    It writes checkpoints, of which it keeps the newest `checkpoint.keep` beside the one that is
    being written, and a tuning an export. Call this with the mesh in force.
    """
    config = training.config
    saved = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    is_trained = str(config.train.num_steps) in saved
    num_to_come = 0 if is_trained else max(1, config.checkpoint.keep + 1 - len(saved))
    checkpoint = count_bytes(jax.tree.leaves(training.abstract_state()))
    export = 0
    if config.finetune is not None:
        export = count_bytes(jax.tree.leaves(jax.eval_shape(training.make_base)))
    needed, free = num_to_come * checkpoint + export, free_bytes(workdir)
    if free >= needed:
        return []
    parts = [f"checkpoints of {in_gib(checkpoint)}"] if num_to_come else []
    parts += [f"an export of {in_gib(export)}"] if export else []
    what = (
        f"too little space in {workdir}: {in_gib(needed)} for {' and '.join(parts)}, "
        f"{in_gib(free)} are free"
    )
    return [Problem(what, "free some, or lower checkpoint.keep")]


def require_disk(training: Training, workdir: Path, mesh: jax.sharding.Mesh) -> None:
    """Makes sure, before anything is trained, that the disk has room for what a run writes.

    Raises:
        ConfigError: it has not; see `check_disk`.
    """
    with jax.set_mesh(mesh):
        for problem in check_disk(training, workdir):
            raise ConfigError(f"{problem.what}: {problem.fix}")


def count_bytes(leaves: Iterable[Any]) -> int:
    """The bytes of arrays, or of the shapes of some."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def check_memory(state_bytes: int, device: Any) -> list[Problem]:
    """Finds that parameters and optimizer state alone fill a device; the step needs more.

    CPUs do not report their memory.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None or state_bytes < limit:
        return []
    what = (
        f"parameters and optimizer state take {in_gib(state_bytes)} of each device, which has "
        f"{in_gib(limit)}"
    )
    return [Problem(what, "shard over more devices: mesh.fsdp, mesh.expert or mesh.tensor")]


def time_sum(mesh: jax.sharding.Mesh) -> float:
    """Seconds for all devices to add up a number each.

    A step does this all the time, and a firewall between hosts stops it.
    """
    sharding = jax.NamedSharding(mesh, P(MESH_AXES))
    host_ones = np.ones(mesh.size, np.float32)
    ones = jax.make_array_from_callback((mesh.size,), sharding, host_ones.__getitem__)
    with jax.set_mesh(mesh):
        add = jax.jit(jnp.sum).lower(ones).compile()
        start = time.monotonic()
        total = float(add(ones))
    assert total == mesh.size, total
    return time.monotonic() - start
