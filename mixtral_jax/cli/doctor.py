"""Says what a run would find here (devices, kernels, free disk, ...) and what would go wrong."""

import json
from typing import IO, Any

from mixtral_jax.cli.flags import add_run_flags, make_parser, parse_config, read_run_flags
from mixtral_jax.cli.output import claim_stdout


def main(arguments: list[str]) -> int:
    """`doctor` with the flags of the run to come: 2 if something would go wrong, else 0."""
    parser = make_parser(__doc__, "pretrain/tiny.py", "doctor")
    add_run_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    namespace, config = parse_config(parser, arguments)
    flags = read_run_flags(namespace, config, arguments)

    from mixtral_jax.parallel.processes import join_processes
    from mixtral_jax.runs.examine import examine

    with claim_stdout() as output, join_processes(flags.launch, requires_all=False) as processes:
        report = examine(flags.config, flags.workdir, processes)
        if processes.index == 0:
            print(json.dumps(report), file=output) if namespace.json else show(report, output)
    return 2 if report["problems"] else 0


def show(report: dict[str, Any], output: IO[str]) -> None:
    """Prints the report for people."""
    from mixtral_jax.runs.console import in_gib, make_console

    say = make_console(output=output).print
    _show_processes(report["processes"], say)
    versions = (f"{name} {version}" for name, version in report["versions"].items())
    say(f"versions    {', '.join(versions)}")
    if "mesh" in report:
        say(f"mesh        {', '.join(f'{axis}={size}' for axis, size in report['mesh'].items())}")
        for line in report["experts"]:
            say(f"experts     {line}")
        state, seconds = in_gib(report["state_bytes_per_device"]), report["sum_seconds"]
        say(f"parameters  {report['parameters']:,}; with the optimizer's state {state} a device")
        say(f"devices     all answer: a sum over them takes {seconds * 1e3:.1f} ms")
    for part, choice in report.get("kernels", {}).items():
        say(f"{part:<12}{choice['name']} ({choice['why']})")
    needed = ""
    if "checkpoint_bytes" in report:
        needed = f"; a checkpoint takes {in_gib(report['checkpoint_bytes'])}"
    say(f"workdir     {report['workdir']}: {in_gib(report['free_bytes'])} free{needed}")
    say(f"cache       {report['cache']}")
    for number, problem in enumerate(report["problems"], start=1):
        say(f"[bold]problem {number}[/]   {problem['what']}\n  [bold]fix[/]       {problem['fix']}")
    if not report["problems"]:
        say("[bold]no problem found[/]")


def _show_processes(processes: list[dict[str, Any]], say: Any) -> None:
    from rich.table import Table

    table = Table("process", "host", "pid", "devices", "workdir")
    for row in processes:
        devices = f"{row['num_devices']} x {row['device_kind']} ({row['platform']})"
        place = row["workdir"] or "-"
        table.add_row(str(row["index"]), row["host"], str(row["pid"]), devices, place)
    say(table)
