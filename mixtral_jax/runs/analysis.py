"""What a model's routers do with a text: read, routed, counted, and written into a folder."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.config import ConfigError
from mixtral_jax.data.batches import spread_labels
from mixtral_jax.data.labels import Labelling, find_labellings
from mixtral_jax.lab.routing.analysis import RoutedText, RoutingAnalysis, analyze
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.pretrained import Dtype, Pretrained, load_pretrained
from mixtral_jax.runs.console import note
from mixtral_jax.runs.eval_data import (
    EvalTask,
    PackedText,
    TrainedRun,
    iterate_batches,
    open_task,
    read_run,
)
from mixtral_jax.whole_files import write_json, write_whole

# Loads the checkpoint of a step.
LoadStep = Callable[[], Pretrained]


def analyze_run(workdir: Path, mesh: jax.sharding.Mesh, processes: Processes) -> RoutingAnalysis:
    """Analyses the newest checkpoint of a run on its held-out text, on devices that are up.

    Leaves out route flips between dtypes, for which the model is compiled once more.

    Raises:
        ConfigError: there is no checkpoint, or what reading the data raises.
    """
    run = read_run(workdir)
    step = find_step(workdir, run)
    if run is None or step is None:
        raise ConfigError(f"{workdir} is no run that has saved a checkpoint")
    loaded = load_pretrained(workdir, mesh=mesh)
    length, num_sequences = loaded.config.train.sequence_length, run.train.eval_sequences
    task = EvalTask(run.data, "held_out", run.is_chat, length, num_sequences)
    earlier = find_earlier(run, step, None, mesh)
    return analyze_text(loaded, task, processes, earlier=earlier, compares_dtypes=False)


def analyze_text(
    loaded: Pretrained,
    task: EvalTask,
    processes: Processes,
    *,
    earlier: dict[int, LoadStep],
    compares_dtypes: bool,
) -> RoutingAnalysis:
    """Reads the text of a task and routes it; `earlier` and `compares_dtypes` are as in `analyze`.

    Raises:
        ConfigError: as `open_task`.
    """
    text, is_shown = open_task(loaded, task, processes), processes.index == 0
    note(f"routing {text.describe(task)}", is_shown=is_shown)
    start = time.monotonic()
    labellings = find_labellings(text.stores, task.data, text.tokenizer)
    pieces = text.tokenizer.pieces(range(text.tokenizer.vocab_size))
    pieces += [f"<{token}>" for token in range(len(pieces), loaded.config.model.vocab_size)]
    routed = RoutedText(
        batches=functools.partial(iterate_batches, loaded, text),
        labels=_iterate_labels(loaded, text, labellings),
        label_names={labelling.title: labelling.names for labelling in labellings},
        pieces=pieces,
    )
    analysis = analyze(loaded, routed, earlier=earlier, compares_dtypes=compares_dtypes)
    seconds = time.monotonic() - start
    note(f"routed {analysis.num_tokens:,} tokens in {seconds:.1f} s", is_shown=is_shown)
    return analysis


def find_earlier(
    run: TrainedRun | None, step: int | None, dtype: Dtype | None, mesh: jax.sharding.Mesh
) -> dict[int, LoadStep]:
    """The checkpoints of a run that were saved before a step, and how to load each.

    There are none for weights that are no step of a run.
    """
    if run is None or step is None:
        return {}
    checkpoints = run.workdir / "checkpoints"
    return {
        number: functools.partial(load_pretrained, checkpoints / str(number), dtype, mesh)
        for number in find_steps(checkpoints)
        if number < step
    }


def find_step(checkpoint: Path, run: TrainedRun | None) -> int | None:
    """The step that a checkpoint of a run is; of a workdir, its newest; None if there is none."""
    if run is None:
        return None
    if (checkpoint / "checkpoints").is_dir():
        return max(find_steps(checkpoint / "checkpoints"), default=None)
    name = checkpoint.absolute().name
    return int(name) if name.isascii() and name.isdigit() else None


def write_analysis(folder: Path, summary: dict[str, Any], analysis: RoutingAnalysis) -> None:
    """Writes `analysis.json` and the figures, in place of those of an earlier text."""
    # Slow to import, and not needed unless somebody keeps the analysis.
    from mixtral_jax.lab.pictures.routing import draw_routing

    path = folder / "analysis.json"
    before = json.loads(path.read_text("utf-8")).get("pictures", []) if path.exists() else []
    pictures = {f"{picture.name}.png": picture for picture in draw_routing(analysis)}
    for name, picture in pictures.items():
        write_whole(folder / name, picture.to_png())
    write_json(path, summary | {"pictures": list(pictures)})
    for name in set(before) - set(pictures):
        (folder / Path(name).name).unlink(missing_ok=True)
    note(f"wrote analysis.json and figures into {folder}")


def _iterate_labels(
    loaded: Pretrained, text: PackedText, labellings: list[Labelling]
) -> Iterator[Any]:
    for store, plan, count in zip(text.stores, text.plans, text.counts, strict=True):
        yield from spread_labels(
            [functools.partial(labelling.label, store) for labelling in labellings],
            plan,
            num_sequences=count,
            batch_size=text.batch_size,
            mesh=loaded.mesh,
            rules=loaded.model.rules,
        )
