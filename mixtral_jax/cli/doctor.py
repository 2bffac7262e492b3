"""Says what a run would find here: processes, devices, versions, kernels, free disk; and what would
go wrong.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from mixtral_jax.cli.flags import RunFlags, add_run_flags, make_parser, parse_config, read_run_flags
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.config import Config, ConfigError
from mixtral_jax.data.cache import default_cache_dir
from mixtral_jax.finetune.tunable import make_tunable
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
from mixtral_jax.parallel.coordinator import find_scheduler
from mixtral_jax.parallel.mesh import MESH_AXES, make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.runs import checkup
from mixtral_jax.runs.checkup import Problem, in_gib
from mixtral_jax.runs.console import make_console
from mixtral_jax.runs.run import choose_kernels, describe_experts, prepare_devices
from mixtral_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.train.state import abstract_state


def main(arguments: list[str]) -> int:
    """`doctor` with the flags of the run to come [--json]: 0 if nothing is wrong, 2 if something
    would go wrong.
    """
    parser = make_parser(__doc__, "pretrain/tiny.py", "doctor")
    add_run_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    namespace, config = parse_config(parser, arguments)
    flags = read_run_flags(namespace, config)
    with claim_stdout() as output, join_processes(flags.launch) as processes:
        report = examine(flags, processes)
        if processes.index == 0:
            print(json.dumps(report), file=output) if namespace.json else show(report, output)
    return 2 if report["problems"] else 0


def examine(flags: RunFlags, processes: Processes) -> dict[str, Any]:
    """All that is found, as JSON can hold it; every process of the run must ask."""
    config = flags.config
    members = introduce(processes, config, flags.workdir)
    differences = find_disagreements(processes, config, members)
    prepare_devices(config)
    devices = share_devices(processes)
    unequal = find_unequal_devices(devices)
    found = [Problem(what, ALIKE) for what in differences] + [
        Problem(what, EQUAL) for what in unequal
    ]
    found += checkup.check_launch(processes, find_scheduler())
    found += checkup.check_workdir(flags.workdir, processes, members)
    found += _check_everywhere(config, processes, members, devices)
    report = {
        "processes": [_row(member, there) for member, there in zip(members, devices, strict=True)],
        "versions": members[0].versions,
        **_examine_plan(
            config, flags.workdir or Path("runs"), found, is_whole=not differences and not unequal
        ),
    }
    return report | {"problems": [dataclasses.asdict(problem) for problem in found]}


def _check_everywhere(
    config: Config, processes: Processes, members: list[Member], devices: list[LocalDevices]
) -> list[Problem]:
    """What each process finds on its own machine; the same finding on several is one."""
    here, local = members[processes.index], devices[processes.index]
    is_alone = [member.host for member in members].count(here.host) == 1
    own = checkup.check_data(config)
    own += checkup.check_accelerators(local.platform, local.count, is_alone, os.environ)
    everywhere = processes.share("problems", [dataclasses.asdict(problem) for problem in own])
    where: dict[Problem, list[int]] = {}
    for index, problems in enumerate(everywhere):
        for problem in problems:
            where.setdefault(Problem(**problem), []).append(index)
    return [
        problem
        if len(ids) == processes.count
        else Problem(
            f"process {', '.join(map(str, ids))} on {members[ids[0]].host}: {problem.what}",
            problem.fix,
        )
        for problem, ids in where.items()
    ]


def _examine_plan(
    config: Config, workdir: Path, found: list[Problem], is_whole: bool
) -> dict[str, Any]:
    """What the config comes to on these devices; adds to `found`.

    `is_whole`: the processes can work together.
    """
    device = jax.local_devices()[0]
    plan: dict[str, Any] = {
        "cache": str(default_cache_dir()),
        "workdir": str(workdir),
        "free_bytes": checkup.free_bytes(workdir),
    }
    try:
        config = checkup.fit_base(config, found)
        config = resolve_mesh(config, jax.device_count())
        choices = choose_kernels(config, device.platform)
    except ConfigError as error:
        found.append(
            checkup.as_problem(
                error, "set the axes in --config.mesh, or use another number of devices"
            )
        )
        return plan
    plan["kernels"] = {part: dataclasses.asdict(choice) for part, choice in choices.items()}
    if not is_whole:
        return plan
    mesh = make_mesh(config.mesh)
    tunable = make_tunable(config, device.platform)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, config.router.learning_rate_factor)
    with jax.set_mesh(mesh):
        count = count_parameters(jax.eval_shape(tunable.make_model))
        leaves = jax.tree.leaves(abstract_state(tunable.make_model, optimizer, tunable.trainable))
    shards = [
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves
    ]
    plan |= {
        "mesh": {axis: mesh.shape[axis] for axis in MESH_AXES},
        "experts": describe_experts(mesh, config.model.num_experts),
        "parameters": count.total,
        "checkpoint_bytes": _size(leaves),
        "state_bytes_per_device": _size(shards),
        "sum_seconds": checkup.time_sum(mesh),
    }
    found += checkup.check_disk(
        plan["free_bytes"], plan["checkpoint_bytes"], config.checkpoint.keep, workdir
    )
    found += checkup.check_memory(plan["state_bytes_per_device"], device)
    return plan


def show(report: dict[str, Any], output: Any) -> None:
    """Prints the report for people."""
    console = make_console(output=output)
    _show_processes(report["processes"], console)
    console.print(
        "versions    "
        f"{', '.join(f'{name} {version}' for name, version in report['versions'].items())}"
    )
    if "mesh" in report:
        console.print(
            f"mesh        {', '.join(f'{axis}={size}' for axis, size in report['mesh'].items())}"
        )
        for line in report["experts"]:
            console.print(f"experts     {line}")
        state, seconds = in_gib(report["state_bytes_per_device"]), report["sum_seconds"]
        console.print(
            f"parameters  {report['parameters']:,}; with the optimizer's state {state} a device"
        )
        console.print(f"devices     all answer: a sum over them takes {seconds * 1e3:.1f} ms")
    for part, choice in report.get("kernels", {}).items():
        console.print(f"{part:<12}{choice['name']} ({choice['why']})")
    needed = (
        f"; a checkpoint takes {in_gib(report['checkpoint_bytes'])}"
        if "checkpoint_bytes" in report
        else ""
    )
    console.print(f"workdir     {report['workdir']}: {in_gib(report['free_bytes'])} free{needed}")
    console.print(f"cache       {report['cache']}")
    for number, problem in enumerate(report["problems"], start=1):
        console.print(
            f"[bold]problem {number}[/]   {problem['what']}\n  [bold]fix[/]       {problem['fix']}"
        )
    if not report["problems"]:
        console.print("[bold]no problem found[/]")


def _show_processes(processes: list[dict[str, Any]], console: Console) -> None:
    table = Table("process", "host", "pid", "devices", "workdir")
    for row in processes:
        devices = f"{row['num_devices']} x {row['device_kind']} ({row['platform']})"
        table.add_row(
            str(row["index"]), row["host"], str(row["pid"]), devices, row["workdir"] or "-"
        )
    console.print(table)


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


def _size(leaves: list[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
