"""What a run would find here: processes, devices, versions, kernels, sizes, and problems."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.config import Config, ConfigError
from mixtral_jax.data.cache import default_cache_dir
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.parallel.agreement import (
    ALIKE,
    EQUAL,
    LocalDevices,
    Member,
    find_disagreements,
    find_unequal_devices,
    introduce,
    share_devices,
)
from mixtral_jax.parallel.memory import device_memory
from mixtral_jax.parallel.mesh import MESH_AXES, make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.schedulers import find_scheduler
from mixtral_jax.runs import checkup
from mixtral_jax.runs.checkup import Problem
from mixtral_jax.runs.describe import describe_experts
from mixtral_jax.runs.run import prepare_devices
from mixtral_jax.training.assemble import Training, make_training


def examine(config: Config, workdir: Path | None, processes: Processes) -> dict[str, Any]:
    """Everything that is found, as values that JSON can hold; all processes must call this."""
    members = introduce(processes, config, workdir)
    differences = find_disagreements(processes, config, members)
    prepare_devices(config, processes)
    devices = share_devices(processes)
    unequal = find_unequal_devices(devices)
    problems = [Problem(what, ALIKE) for what in differences]
    problems += [Problem(what, EQUAL) for what in unequal]
    problems += checkup.check_launch(processes, find_scheduler())
    problems += checkup.check_workdir(workdir, processes, members)
    problems += _check_each_machine(config, processes, members, devices)
    can_work_together = not differences and not unequal
    fitted = checkup.fit_base(config, problems, is_shown=processes.index == 0)
    workdir = workdir or Path("runs")
    plan = _examine_plan(fitted, workdir, processes, problems, can_work_together)
    return {
        "processes": [_row(*pair) for pair in zip(members, devices, strict=True)],
        "versions": members[0].versions,
        **plan,
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }


def _check_each_machine(
    config: Config, processes: Processes, members: list[Member], devices: list[LocalDevices]
) -> list[Problem]:
    """What each process finds on its own machine; the same problem on several is listed once."""
    here, local = members[processes.index], devices[processes.index]
    is_alone = [member.host for member in members].count(here.host) == 1
    own = checkup.check_data(config)
    own += checkup.check_accelerators(local.platform, local.count, is_alone, os.environ)
    everywhere = processes.share("problems", [dataclasses.asdict(problem) for problem in own])
    indices_of: dict[Problem, list[int]] = {}
    for index, problems in enumerate(everywhere):
        for problem in problems:
            indices_of.setdefault(Problem(**problem), []).append(index)
    return [
        problem if len(indices) == processes.count else _locate(problem, indices, members)
        for problem, indices in indices_of.items()
    ]


def _locate(problem: Problem, indices: list[int], members: list[Member]) -> Problem:
    """The problem, with the processes that have it."""
    where = f"process {', '.join(map(str, indices))} on {members[indices[0]].host}"
    return Problem(f"{where}: {problem.what}", problem.fix)


def _examine_plan(
    config: Config,
    workdir: Path,
    processes: Processes,
    problems: list[Problem],
    can_work_together: bool,
) -> dict[str, Any]:
    """What the config comes to on these devices; adds to `problems`."""
    device, memory = jax.local_devices()[0], device_memory(processes)
    plan: dict[str, Any] = {
        "cache": str(default_cache_dir()),
        "workdir": str(workdir),
        "free_bytes": checkup.free_bytes(workdir),
    }
    try:
        config = resolve_mesh(config, jax.device_count())
        training = make_training(config, device.platform, memory)
    except ConfigError as error:
        fix = "set the axes in --config.mesh, or use another number of devices"
        problems.append(checkup.as_problem(error, fix))
        return plan
    kernels = training.kernels
    plan["kernels"] = {
        "attention": dataclasses.asdict(kernels.attention),
        "matmul": dataclasses.asdict(kernels.grouped_matmul),
        "transport": dataclasses.asdict(kernels.transport),
        "remat": dataclasses.asdict(kernels.remat),
    }
    if not can_work_together:
        return plan
    plan |= _measure(training)
    with jax.set_mesh(make_mesh(config.mesh)):
        problems += checkup.check_disk(training, workdir)
    problems += checkup.check_memory(plan["state_bytes_per_device"], device)
    return plan


def _measure(training: Training) -> dict[str, Any]:
    """Mesh and sizes of a training, and how long the devices take to add up numbers."""
    mesh = make_mesh(training.config.mesh)
    with jax.set_mesh(mesh):
        count = count_parameters(jax.eval_shape(training.make_model))
        leaves = jax.tree.leaves(training.abstract_state())
    shards = [
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves
    ]
    return {
        "mesh": {axis: mesh.shape[axis] for axis in MESH_AXES},
        "experts": describe_experts(mesh, training.config.model.num_experts),
        "parameters": count.total,
        "checkpoint_bytes": checkup.count_bytes(leaves),
        "state_bytes_per_device": checkup.count_bytes(shards),
        "sum_seconds": checkup.time_sum(mesh),
    }


def _row(member: Member, devices: LocalDevices) -> dict[str, Any]:
    return {
        "index": member.index,
        "host": member.host,
        "pid": member.pid,
        "platform": devices.platform,
        "device_kind": devices.kind,
        "num_devices": devices.count,
        "workdir": member.workdir,
    }
