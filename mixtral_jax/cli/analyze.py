"""What routing does with a text: balance, pairs of experts, specialisation, ... with figures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mixtral_jax.cli.flags import make_verb_parser, parse_path
from mixtral_jax.cli.model_flags import (
    add_model_flags,
    open_model,
    parse_model_flags,
)
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.cli.task_flags import add_task_flags, choose_data, read_task
from mixtral_jax.config import ConfigError, DataConfig

# Rows of other data than the run's own that are routed by default.
DEFAULT_NUM_SEQUENCES = 256
# In a pipe, wide enough for the tables.
PIPE_COLUMNS = 140


def main(arguments: list[str]) -> int:
    """`analyze --checkpoint MODEL [--data.path=TEXT] [--json] [--to FOLDER]`."""
    parser = make_verb_parser(__doc__, "analyze")
    add_model_flags(parser)
    add_task_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else on standard output"
    )
    parser.add_argument(
        "--to",
        type=parse_path,
        help="where to write analysis.json and figures; by default the run's analysis/STEP, and of "
        "a folder that is no run's, nowhere",
    )
    flags, model, _ = parse_model_flags(parser, arguments, data=DataConfig)

    from mixtral_jax.data.sources import require_sources
    from mixtral_jax.parallel.processes import join_processes
    from mixtral_jax.runs.analysis import analyze_text, find_earlier, find_step, write_analysis
    from mixtral_jax.runs.eval_data import read_run

    run = read_run(flags.checkpoint)
    data = choose_data(arguments, run)
    require_sources(data)  # Missing data are found before much is loaded.
    step = find_step(flags.checkpoint, run)
    folder = flags.to
    if folder is None and run is not None and step is not None:
        folder = run.workdir / "analysis" / str(step)
    with claim_stdout() as output, join_processes(model.launch) as processes:
        if folder and processes.index == 0:
            _make_folder(folder)
        loaded = open_model(model, processes)
        task = read_task(flags, arguments, run, data, loaded)
        num_sequences = task.num_sequences or DEFAULT_NUM_SEQUENCES
        task = dataclasses.replace(task, num_sequences=num_sequences)
        earlier = find_earlier(run, step, model.dtype, loaded.mesh)
        analysis = analyze_text(loaded, task, processes, earlier=earlier, compares_dtypes=True)
        if processes.index == 0:
            summary = {
                "checkpoint": str(model.checkpoint),
                "step": step,
                "data": task.data.path,
                "part": task.part,
                "sequence_length": task.sequence_length,
                **analysis.to_json(),
            }
            if folder:
                write_analysis(folder, summary, analysis)
            _print(summary if flags.json else None, analysis, output)
    return 0


def _make_folder(folder: Path) -> None:
    """Makes the folder early, so that nothing is computed that cannot be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}): name another with --to=DIR"
        ) from None


def _print(summary: dict[str, Any] | None, analysis: Any, output: Any) -> None:
    """Prints the summary as JSON, or tables if it is None."""
    if summary is not None:
        print(json.dumps(summary), file=output)
        return
    from rich.console import Console

    from mixtral_jax.lab.routing.tables import print_analysis

    width = None if output.isatty() else PIPE_COLUMNS
    print_analysis(analysis, Console(file=output, highlight=False, width=width))
