"""The recipe of instruct tuning: a base, its answers before and after, and seeds to choose from."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from mixtral_jax.checkpoint.formats.tokenizer_json import make_tokenizer_json
from mixtral_jax.config import Config
from mixtral_jax.data.sources import require_sources
from mixtral_jax.data.tokenizer import read_tokenizer
from mixtral_jax.parallel.mesh import resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.answers import Answers, ask, ask_base, compare_with_base, report_answers
from mixtral_jax.runs.base import (
    Base,
    naming_pretrain_path,
    open_base,
    open_named_base,
    plan_base,
    require_tunable,
    saved_steps,
)
from mixtral_jax.runs.chat_data import open_chat
from mixtral_jax.runs.checkup import require_disk
from mixtral_jax.runs.console import print_notes
from mixtral_jax.runs.describe import describe_run
from mixtral_jax.runs.export import save_adapters
from mixtral_jax.runs.pretrain import pretrain
from mixtral_jax.runs.run import Run, platform_of, start_run
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.training import Callback, train_model
from mixtral_jax.runs.workdir import check_saved
from mixtral_jax.training.assemble import make_training
from mixtral_jax.whole_files import write_json


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A run that has ended, and its model's answers to held-out questions."""

    run: Run
    answers: Answers


def find_base(
    config: Config,
    workdir: Path,
    processes: Processes,
    stop: StopSignal,
    named_keys: Sequence[str] = (),
) -> Base | None:
    """The base that `finetune.base` names, or one pretrained into `workdir/base`.

    Args:
        named_keys: keys of the config that a command line sets; a note says which of them a named
            base makes void.

    Returns:
        None if the pretraining was stopped.

    Raises:
        ConfigError: the base is no model that can be tuned; or the tuning cannot work, which is
            found before anything is pretrained.
    """
    assert config.finetune is not None
    if config.finetune.base is not None:
        is_shown = processes.index == 0
        base = open_named_base(config, is_shown=is_shown)
        if unused := base.find_unused(named_keys, "finetune"):
            note = f"{', '.join(unused)}: without effect, since the base has its own"
            print_notes([note], is_shown=is_shown)
        return base
    require_tunable(config)
    if processes.index == 0:
        # Runs that were started before began with a base that these settings made.
        for tuned in (workdir, *sorted(workdir.glob("seed-*"))):
            check_saved(tuned, config, "finetune.pretrain.")
    run = start_run(plan_base(config, config.finetune.pretrain), workdir / "base", processes)
    _check_tuning(config, workdir, run)
    if run.config.train.num_steps not in saved_steps(run):
        run.console.print(f"finetune.base is not given: pretraining a base into {run.workdir}")
        with naming_pretrain_path(config.finetune.pretrain, "finetune"):
            if pretrain(run, stop) == "stopped":
                return None
    return open_base(run.workdir, config, is_shown=run.is_writer)


def _check_tuning(config: Config, workdir: Path, run: Run) -> None:
    """Finds now what the tuning in `workdir` would find when `run` has made its base.

    Such as missing data, targets without a match, or too little space.
    """
    config = resolve_mesh(config, run.mesh.size)
    require_sources(config.data)
    if config.data.tokenizer and not config.data.tokenizer.startswith("train:"):
        make_tokenizer_json(read_tokenizer(config.data.tokenizer))  # As the export will.
    training = make_training(config, platform_of(run.mesh))
    with jax.set_mesh(run.mesh):
        jax.eval_shape(training.make_model)
    require_disk(training, workdir, run.mesh)


def tune(
    run: Run, base: Base, stop: StopSignal, callbacks: Sequence[Callback] = ()
) -> Tuned | None:
    """Tunes a base from wherever the workdir stands, and asks it questions before and after.

    Returns:
        None if it was stopped.
    """
    describe_run(run)
    require_disk(run.training, run.workdir, run.mesh)
    with stop.at_once():
        data = open_chat(run, base.tokenizer)
    # Read by whoever opens the workdir, and by the export. A run that goes on keeps its own, since
    # the folder of its base may hold another model by now.
    if not saved_steps(run) and run.is_writer:
        side_files = base.weights.side_files
        side_files.after_training(base.tokenizer, data.template).save(run.workdir)
    before = ask_base(base, run, data)
    compared = compare_with_base(data, before)
    ending = train_model(run, compared, stop, base.loader(run), callbacks)
    if ending.outcome == "stopped":
        return None
    save_adapters(run, ending.state, base.folder)
    del ending  # Frees its memory for the model that is asked.
    after = ask(run.workdir, run, data)
    report_answers(run, data, before, after)
    return Tuned(run, after)


def tune_seeds(
    num_seeds: int,
    config: Config,
    workdir: Path,
    tune_one: Callable[[Config, Path], Tuned | None],
) -> Tuned | None:
    """Tunes once per seed and chooses the best; several seeds get a folder each in the workdir.

    Args:
        tune_one: tunes one config in one workdir; None if it was stopped.

    Returns:
        None if it was stopped.
    """
    if num_seeds == 1:
        return tune_one(config, workdir)
    results: list[Tuned] = []
    for seed in range(config.train.seed, config.train.seed + num_seeds):
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        tuned = tune_one(seeded, workdir / f"seed-{seed}")
        if tuned is None:
            return None
        results.append(tuned)
    return choose_best(results, workdir)


def choose_best(results: Sequence[Tuned], workdir: Path) -> Tuned:
    """The run with the lowest held-out loss; prints the spread, and writes `seeds.json`."""
    best = min(results, key=lambda tuned: tuned.answers.loss)
    losses = {tuned.run.config.train.seed: tuned.answers.loss for tuned in results}
    mean, deviation = statistics.mean(losses.values()), statistics.stdev(losses.values())
    for tuned in results:
        answers, mark = tuned.answers, " (best)" if tuned is best else ""
        tuned.run.console.print(
            f"seed {tuned.run.config.train.seed}: held-out loss {answers.loss:.4f}, "
            f"{answers.num_ended} of {len(answers.answers)} answers ended by themselves{mark}"
        )
    best.run.console.print(
        f"held-out loss over {len(results)} seeds: mean {mean:.4f}, "
        f"standard deviation {deviation:.4f}"
    )
    if best.run.is_writer:
        summary = {
            "losses": losses,
            "mean": mean,
            "standard_deviation": deviation,
            "best": best.run.config.train.seed,
        }
        write_json(workdir / "seeds.json", summary)
    return best
