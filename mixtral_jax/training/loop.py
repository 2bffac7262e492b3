"""The one train loop. It composes what it is given, and imports neither data nor evaluation."""

import dataclasses
import datetime
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import jax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.config import CheckpointConfig, TrainConfig
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.training.garbage import collect_only_when_asked
from mixtral_jax.training.metrics import MetricLog, Record, check_finite
from mixtral_jax.training.queue import StepQueue
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import TrainStep, peak_memory_bytes

Outcome = Literal["finished", "stopped"]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended, and the state after its last step, which is saved."""

    outcome: Outcome
    state: TrainState


class Progress(Protocol):
    """Shows people how far the loop has come; a context that is open while it trains."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *_: object) -> None: ...

    def say(self, line: str) -> None:
        """Shows a line."""
        ...

    def start_clock(self) -> None:
        """Estimates of the time left count from here: compiling is over."""
        ...

    def report(self, record: Record) -> None:
        """Shows the record of a logged step."""
        ...


@dataclasses.dataclass(frozen=True)
class _Due:
    """What is due after a step, besides the next one."""

    evaluation: bool
    log: bool
    checkpoint: bool


@dataclasses.dataclass
class TrainLoop:
    """Everything a run needs besides its state.

    Attributes:
        batches: yields a batch and its hash, from the first step that is not yet done.
        evaluate: from the model to `eval/` figures.
        is_stop_requested: asked before the first step, and after every step but the last; with
            several processes, all get the same answer to the nth question.
        record: saved with every checkpoint; holds the number of tokens trained on so far.
        callbacks: each is called with the record of every logged step, on every process.
    """

    config: TrainConfig
    checkpoint: CheckpointConfig
    train_step: TrainStep
    batches: Iterator[tuple[Batch, str]]
    evaluate: Callable[[Any], dict[str, Any]]
    checkpoints: RunCheckpoints
    log: MetricLog
    progress: Progress
    is_stop_requested: Callable[[], bool]
    record: dict[str, Any]
    callbacks: Sequence[Callable[[Record], None]] = ()

    def run(self, state: TrainState) -> Ending:
        """Trains to `num_steps`, or until told to stop; the last step is on disk on return."""
        first, last, say = int(state.step), self.config.num_steps, self.progress.say
        if first >= last:
            say(f"nothing to do: step {first} is saved, and train.num_steps={last}")
            return Ending("finished", state)
        go_on = "the same command with this --workdir goes on"
        if self.is_stop_requested():
            say(f"stopped before step {first + 1}: {go_on}")
            return Ending("stopped", state)
        with self.progress:
            batch = next(self.batches)
            train_step = self._compile(state, batch[0])
            self.progress.start_clock()
            started = time.monotonic()
            self.batches = itertools.chain([batch], self.batches)
            ending = self._train(state, train_step)
            self.checkpoints.wait()
        if ending.outcome == "stopped":
            say(f"stopped after step {int(ending.state.step)}, which is saved: {go_on}")
        else:
            took = datetime.timedelta(seconds=round(time.monotonic() - started))
            say(f"done: {last - first} steps in {took}; step {last} is saved")
        return ending

    def _train(self, state: TrainState, train_step: jax.stages.Compiled) -> Ending:
        first, last = int(state.step), self.config.num_steps
        queue = StepQueue(self.record["tokens"])
        with collect_only_when_asked() as collect:
            for step in range(first + 1, last + 1):
                batch, batch_hash = self._next_batch(queue)
                state, metrics = train_step(state, batch)
                # The devices are busy with this step while the host tells of earlier ones.
                for record in queue.read_earlier():
                    self._tell(record)
                    collect()
                is_stopping = step < last and self.is_stop_requested()
                due = self._find_due(step, is_stopping=is_stopping)
                queue.add(step, metrics, batch_hash, has_record=due.log or due.checkpoint)
                if due.evaluation or due.checkpoint:  # Before the next step takes the state.
                    (record,) = queue.read_all()
                    self._finish_step(state, record, due)
                    collect()
                    queue.restart_clock()
                if is_stopping:
                    return Ending("stopped", state)
        return Ending("finished", state)

    def _next_batch(self, queue: StepQueue) -> tuple[Batch, str]:
        """The next batch. If there is none, all steps so far are told of before the error."""
        try:
            return next(self.batches)
        except Exception:
            for record in queue.read_all():
                self._tell(record)
            raise

    def _find_due(self, step: int, *, is_stopping: bool) -> _Due:
        num_steps = self.config.num_steps
        eval_every = self.config.eval_every or max(1, num_steps // 10)
        save_every = self.checkpoint.every or max(1, num_steps // 4)
        is_last = step == num_steps
        evaluation = is_last or step % eval_every == 0
        return _Due(
            evaluation=evaluation,
            log=evaluation or step % self.config.log_every == 0,
            checkpoint=is_last or is_stopping or step % save_every == 0,
        )

    def _finish_step(self, state: TrainState, record: Record, due: _Due) -> None:
        """Evaluates, logs and saves, as far as they are due."""
        check_finite(record)
        if due.evaluation:
            record |= self.evaluate(state.model())
        if due.log:
            self._tell(record)
        if due.checkpoint:
            saved = self.record | {"tokens": record["tokens"]}
            self.checkpoints.save(record["step"], state, saved)

    def _tell(self, record: Record) -> None:
        """Logs a record and shows it."""
        check_finite(record)
        self.log.write(record)
        self.progress.report(record)
        for callback in self.callbacks:
            callback(dict(record))

    def _compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        self.progress.say("compiling the train step ...")
        start = time.monotonic()
        compiled = self.train_step.lower(state, batch).compile()
        peak = peak_memory_bytes(compiled)
        memory = "" if peak is None else f"; {peak / 2**20:,.0f} MiB a device at its peak"
        self.progress.say(f"compiled in {time.monotonic() - start:.0f} s{memory}")
        return compiled
