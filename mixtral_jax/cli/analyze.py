"""What routing does with a text: balance, pairs of experts, repetition, specialisation, saturation;
with figures.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.cli.analysis_tables import print_analysis
from mixtral_jax.cli.flags import make_verb_parser, parse_path
from mixtral_jax.cli.model_flags import (
    ModelFlags,
    add_model_flags,
    note,
    open_model,
    parse_model_flags,
)
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.config import ConfigError, DataConfig, require
from mixtral_jax.data.batches import spread_labels
from mixtral_jax.data.labels import Labelling, find_labellings
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.lab.routing.analysis import RoutedText, RoutingAnalysis, analyze
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.pretrained import Dtype, Pretrained, load_pretrained
from mixtral_jax.runs.eval_data import (
    PackedText,
    Task,
    TrainedRun,
    add_task_flags,
    iterate_batches,
    open_task,
    plan_task,
    read_run,
)
from mixtral_jax.runs.workdir import write_json

# Rows of other data that are routed unless more are asked for.
_NUM_SEQUENCES = 256


def main(arguments: list[str]) -> int:
    """`analyze --checkpoint DIR [--data.path=F] [--json] [--to DIR]`."""
    parser = make_verb_parser(__doc__, "analyze")
    add_model_flags(parser)
    add_task_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else on standard output"
    )
    parser.add_argument(
        "--to",
        type=parse_path,
        help="where to write analysis.json and figures; by default the run's "
        "analysis/STEP, and of a folder that is no run's, nowhere",
    )
    flags, model, sections = parse_model_flags(parser, arguments, data=DataConfig)
    run = read_run(flags.checkpoint)
    data = _choose_data(
        sections["data"], any(each.startswith("--data.path=") for each in arguments), run
    )
    fingerprint_source(data.path, data.suffixes)  # Whether there are any, before much is loaded.
    step = _find_step(flags.checkpoint, run)
    folder = flags.to or (
        run.workdir / "analysis" / str(step) if run and step is not None else None
    )
    with claim_stdout() as output, join_processes(model.launch) as processes:
        if folder and processes.index == 0:
            _make_folder(folder)
        loaded = open_model(model, processes)
        task = plan_task(flags, data, loaded)
        task = dataclasses.replace(task, num_sequences=task.num_sequences or _NUM_SEQUENCES)
        earlier = (
            find_earlier(run, step, model.dtype, loaded.mesh) if run and step is not None else {}
        )
        start = time.monotonic()
        analysis = analyze_text(loaded, task, processes, earlier=earlier)
        note(
            f"routed {analysis.num_tokens:,} tokens in {time.monotonic() - start:.1f} s",
            is_shown=processes.index == 0,
        )
        if processes.index == 0:
            said = _describe(model, task, step) | analysis.to_json()
            if folder:
                _write(folder, said, analysis)
            if flags.json:
                print(json.dumps(said), file=output)
            else:
                print_analysis(
                    analysis, Console(file=output, highlight=False, width=_width(output))
                )
    return 0


def analyze_run(
    workdir: Path, mesh: jax.sharding.Mesh, processes: Processes, *, quick: bool = True
) -> RoutingAnalysis:
    """The newest checkpoint of a run, by its held-out text, in a process that has its devices
    already.

    Args:
        quick: leaves out the route flips, for which the model is compiled once more.

    Raises:
        ConfigError: there is no checkpoint, or what reading the data raises.
    """
    run = read_run(workdir)
    step = _find_step(workdir, run)
    if run is None or step is None:
        raise ConfigError(f"{workdir} is no run that has saved a checkpoint")
    loaded = load_pretrained(workdir, mesh=mesh)
    task = Task(
        run.data,
        "held_out",
        run.is_chat,
        loaded.config.train.sequence_length,
        run.train.eval_sequences,
    )
    earlier = find_earlier(run, step, None, mesh)
    return analyze_text(loaded, task, processes, earlier=earlier, compares_dtypes=not quick)


def analyze_text(
    loaded: Pretrained,
    task: Task,
    processes: Processes,
    *,
    earlier: dict[int, Callable[[], Pretrained]],
    compares_dtypes: bool = True,
) -> RoutingAnalysis:
    """Reads the text of a task and routes it; further arguments as those of `analyze`.

    Raises:
        ConfigError: what `open_task` raises.
    """
    text = open_task(loaded, task, processes)
    said = f"routing {sum(text.counts):,} rows of {task.sequence_length} tokens, {task.part} of {task.data.path}"
    note(said, is_shown=processes.index == 0)
    labellings = find_labellings(text.stores, task.data.path, text.tokenizer)
    pieces = text.tokenizer.pieces(range(text.tokenizer.vocab_size))
    pieces += [f"<{token}>" for token in range(len(pieces), loaded.config.model.vocab_size)]
    routed = RoutedText(
        batches=functools.partial(iterate_batches, loaded, text),
        labels=_iterate_labels(loaded, text, labellings),
        label_names={labelling.title: labelling.names for labelling in labellings},
        pieces=pieces,
    )
    return analyze(loaded, routed, earlier=earlier, compares_dtypes=compares_dtypes)


def find_earlier(
    run: TrainedRun, step: int, dtype: Dtype | None, mesh: jax.sharding.Mesh
) -> dict[int, Callable[[], Pretrained]]:
    """The checkpoints of a run that were saved before a step, and how to load each."""
    checkpoints = run.workdir / "checkpoints"
    return {
        number: functools.partial(load_pretrained, checkpoints / str(number), dtype, mesh)
        for number in find_steps(checkpoints)
        if number < step
    }


def _choose_data(given: DataConfig, is_named: bool, run: TrainedRun | None) -> DataConfig:
    """What the flags name, or else the run's own data, with what they change of it."""
    if is_named:
        return given
    require(
        run is not None,
        "--data.path=F must name the data: the checkpoint is no run's, which would name its own",
    )
    assert run is not None
    default = DataConfig()
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return dataclasses.replace(
        run.data, **{key: new for key, new in fields.items() if new != getattr(default, key)}
    )


def _find_step(checkpoint: Path, run: TrainedRun | None) -> int | None:
    """The step that `checkpoint` is, of a run; its newest, if that is a workdir."""
    if run is None:
        return None
    if (checkpoint / "checkpoints").is_dir():
        return max(find_steps(checkpoint / "checkpoints"), default=None)
    name = checkpoint.absolute().name
    return int(name) if name.isascii() and name.isdigit() else None


def _iterate_labels(loaded: Pretrained, text: PackedText, labellings: list[Labelling]):
    for store, plan, count in zip(text.stores, text.plans, text.counts, strict=True):
        yield from spread_labels(
            [functools.partial(labelling.label, store) for labelling in labellings],
            plan,
            num_sequences=count,
            batch_size=text.batch_size,
            mesh=loaded.mesh,
            rules=loaded.model.rules,
        )


def _describe(model: ModelFlags, task: Task, step: int | None) -> dict[str, Any]:
    return {
        "checkpoint": str(model.checkpoint),
        "step": step,
        "data": task.data.path,
        "part": task.part,
        "sequence_length": task.sequence_length,
    }


def _make_folder(folder: Path) -> None:
    """Early, so that nothing is computed that cannot be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}): name another with --to=DIR"
        ) from None


def _write(folder: Path, said: dict[str, Any], analysis: RoutingAnalysis) -> None:
    # Slow to import, and a report that nobody keeps needs none.
    from mixtral_jax.lab.pictures.routing import draw_routing

    path = folder / "analysis.json"
    before = json.loads(path.read_text("utf-8")).get("pictures", []) if path.exists() else []
    pictures = {f"{picture.name}.png": picture for picture in draw_routing(analysis)}
    write_json(path, said | {"pictures": list(pictures)})
    for name in set(before) - set(pictures):  # Of another text that was analysed into this folder.
        (folder / Path(name).name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture.to_png())
    note(f"wrote analysis.json and figures into {folder}")


def _width(output: Any) -> int | None:
    """That of the terminal; in a pipe, enough for the tables."""
    return None if output.isatty() else 140
