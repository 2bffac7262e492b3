"""Runs from Python, for notebooks and programs: what the scripts do, as functions that return.

A face of the recipes beside it: `mixtral_jax.train` and `mixtral_jax.tune` are these functions.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from mixtral_jax.config import Config, ConfigError, local_path, require
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.parallel.schedulers import require_all_met
from mixtral_jax.pretrained import Pretrained, load_pretrained
from mixtral_jax.runs.export import export_run
from mixtral_jax.runs.own_data import (
    Conversation,
    Document,
    keep_conversations,
    keep_documents,
)
from mixtral_jax.runs.pretrain import pretrain
from mixtral_jax.runs.run import Run, choose_workdir, start_run
from mixtral_jax.runs.stop import EXIT_CODES, StopSignal
from mixtral_jax.runs.training import Callback
from mixtral_jax.runs.tune import find_base
from mixtral_jax.runs.tune import tune as tune_base
from mixtral_jax.runs.workdir import release_workdirs
from mixtral_jax.training.loop import Outcome
from mixtral_jax.training.loss import Loss


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        outcome: `finished`, or `stopped` by Ctrl-C or SIGTERM after a step that is saved; the same
            call then goes on.
        config: of the run; its mesh is numbers, unless the run was stopped before it had one.
        workdir: holds its checkpoints and all other files.
        metrics: the rows of metrics.jsonl, one per logged step.
        mesh: the devices of the run; None if it was stopped before it had one.
    """

    outcome: Outcome
    config: Config
    workdir: Path
    metrics: list[dict[str, Any]]
    mesh: jax.sharding.Mesh | None

    @functools.cached_property
    def loaded(self) -> Pretrained:
        """The model of the newest checkpoint, loaded when it is first asked for."""
        return load_pretrained(self.workdir, self.config.model.dtype, self.mesh)


def train(
    config: Config,
    *,
    workdir: str | Path | None = None,
    data: Iterable[Document] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Pretrains a model, as train.py does; the same workdir again resumes.

    Args:
        config: as of `load_config`.
        workdir: where everything is written; by default a new folder under runs/.
        data: documents, each a text or a list of token ids; None reads `config.data.path`. Token
            ids need `data.tokenizer` to name the tokenizer that made them; BOS and EOS are added
            where a document lacks them.
        optimizer: an optax transformation in place of the config's, whose update takes gradients
            and parameters. `router.learning_rate_factor` then does nothing. A resumed run needs the
            same one.
        loss: of the task, in place of the cross entropy of the next token: a function of the
            output, the micro-batch and the totals of the step (`mixtral_jax.training.loss.Loss`).
            Held-out loss stays cross entropy. A resumed run needs the same one; it is not saved.
        callbacks: each is called with the row of every logged step; rows of evaluations have
            `eval/` figures in them.

    A dense model that is pretrained on the way (`upcycle`) gets none of the last three.

    Raises:
        ConfigError: what train.py exits with code 2 for.
        KeyboardInterrupt: Ctrl-C before the first step, when there is nothing to save.
    """
    require(config.finetune is None, "the config has a section finetune: call mixtral_jax.tune")
    with _session() as (processes, stop):
        folder = choose_workdir(_to_path(workdir), "python", processes)
        if data is not None:
            config = keep_documents(data, config, folder)
        run = start_run(config, folder, processes, optimizer=optimizer, loss=loss)
        outcome = pretrain(run, stop, callbacks)
    return _result(run, outcome)


def tune(
    config: Config,
    *,
    workdir: str | Path | None = None,
    base: str | Path | None = None,
    data: Iterable[Conversation] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Tunes a model on conversations, as finetune_instruct.py does; the same workdir resumes.

    The tuned model is exported to `workdir/export`, for other programs.

    Args:
        config: as of `load_config`, with a section `finetune`.
        base: the model that is tuned: whatever `load_pretrained` takes; None takes
            `config.finetune.base`, or pretrains a small one.
        data: conversations, each a list of messages or a row of any chat format; None reads
            `config.data.path`.

    The other arguments are those of `train`; a base that is pretrained gets none of them.

    Raises:
        ConfigError: what finetune_instruct.py exits with code 2 for.
        KeyboardInterrupt: Ctrl-C before the first step, when there is nothing to save.
    """
    if config.finetune is None:
        raise ConfigError("the config has no section finetune: call mixtral_jax.train")
    if base is not None:
        finetune = dataclasses.replace(config.finetune, base=str(base))
        config = dataclasses.replace(config, finetune=finetune)
    with _session() as (processes, stop):
        folder = choose_workdir(_to_path(workdir), "python", processes)
        if data is not None:
            config = keep_conversations(data, config, folder)
        found = find_base(config, folder, processes, stop)
        if found is None:
            return RunResult("stopped", config, folder, metrics=[], mesh=None)
        fitted = found.fit(config)
        run = start_run(fitted, folder, processes, optimizer=optimizer, loss=loss)
        tuned = tune_base(run, found, stop, callbacks)
        if tuned is not None:
            with stop.at_once():
                export_run(run, folder / "export")
    return _result(run, "stopped" if tuned is None else "finished")


@contextlib.contextmanager
def _session() -> Iterator[tuple[Processes, StopSignal]]:
    """One process and its signals.

    At its end workdirs are released, and jax's matmul precision is what it was. The number of
    virtual CPU devices stays: jax cannot change it once it has started.

    Raises:
        ConfigError: this is one of several processes.
        KeyboardInterrupt: a signal came while there was nothing to save.
    """
    require(
        not jax.distributed.is_initialized(),
        "mixtral_jax.train and tune are for one process: start train.py on each host instead",
    )
    require_all_met(1)
    settings: Any = jax.config
    precision = settings.jax_default_matmul_precision
    processes = Processes()
    try:
        with processes, StopSignal(processes) as stop:
            yield processes, stop
    except SystemExit as error:
        if error.code == EXIT_CODES["stopped"]:
            raise KeyboardInterrupt from None  # A library does not end its caller's program.
        raise
    finally:
        release_workdirs()
        jax.config.update("jax_default_matmul_precision", precision)


def _to_path(path: str | Path | None) -> Path | None:
    return None if path is None else local_path(path, "workdir")


def _result(run: Run, outcome: Outcome) -> RunResult:
    path = run.workdir / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    metrics = [json.loads(line) for line in lines]
    return RunResult(outcome, run.config, run.workdir, metrics, run.mesh)
