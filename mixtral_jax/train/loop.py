"""The one train loop. It composes what it is given, and imports neither data nor evaluation."""

import contextlib
import dataclasses
import datetime
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from rich.console import Console

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.config import CheckpointConfig, TrainConfig
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.console import RunProgress
from mixtral_jax.train.metrics import MetricLog, Record, check_finite
from mixtral_jax.train.state import TrainState
from mixtral_jax.train.step import TrainStep, peak_memory_bytes

Outcome = Literal["finished", "stopped"]
EXIT_CODES: dict[Outcome, int] = {
    "finished": 0,
    "stopped": 75,
}  # 75: EX_TEMPFAIL, run the same command again


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended, and the state after its last step, which is saved."""

    outcome: Outcome
    state: TrainState


@dataclasses.dataclass
class TrainLoop:
    """Everything a run needs besides its state.

    `batches` yields, from the first step not yet done, a batch and its hash; `evaluate` gives
    `eval/` figures of the model; `record` is saved with every checkpoint, and holds the tokens seen
    so far.
    """

    config: TrainConfig
    checkpoint: CheckpointConfig
    train_step: TrainStep
    batches: Iterator[tuple[Batch, str]]
    evaluate: Callable[[Any], dict[str, Any]]
    checkpoints: RunCheckpoints
    log: MetricLog
    console: Console
    stop: "StopSignal"
    record: dict[str, Any]

    def run(self, state: TrainState) -> Ending:
        """Trains to `num_steps`, or until told to stop; either way the last step is on disk on
        return.
        """
        first_step, num_steps = int(state.step), self.config.num_steps
        if first_step >= num_steps:
            self.console.print(f"nothing to do: step {first_step} of {num_steps} is already saved")
            return Ending("finished", state)
        if self.stop.is_due():
            self.console.print(
                f"stopped before step {first_step + 1}: the same command with this --workdir goes "
                "on"
            )
            return Ending("stopped", state)
        eval_every = self.config.eval_every or max(1, num_steps // 10)
        save_every = self.checkpoint.every or max(1, num_steps // 4)
        is_stopping, step = False, first_step
        with RunProgress(self.console, first_step, num_steps) as progress:
            batch, batch_hash = next(self.batches)
            train_step = self._compile(state, batch)
            progress.start_clock()
            meter = _TokenMeter(self.record["tokens"])
            started = time.monotonic()
            for step in range(first_step + 1, num_steps + 1):
                state, metrics = train_step(state, batch)
                meter.add(metrics["tokens"])
                is_last = step == num_steps
                is_stopping = not is_last and self.stop.is_due()
                is_evaluating = is_last or step % eval_every == 0
                is_logging = is_evaluating or step % self.config.log_every == 0
                is_saving = is_last or is_stopping or step % save_every == 0
                if is_logging or is_saving:
                    record = {
                        "step": step,
                        **_to_host(metrics),
                        **meter.read(),
                        "batch_hash": batch_hash,
                    }
                    check_finite(record)
                    if is_evaluating:
                        record |= self.evaluate(state.model())
                    if is_logging:
                        self.log.write(record)
                        progress.report(record)
                    if is_saving:
                        self.checkpoints.save(
                            step, state, self.record | {"tokens": record["tokens"]}
                        )
                    meter.restart()
                if is_stopping:
                    break
                if not is_last:
                    batch, batch_hash = next(self.batches)
            self.checkpoints.wait()
        took = datetime.timedelta(seconds=round(time.monotonic() - started))
        if is_stopping:
            self.console.print(
                f"stopped after step {step}, which is saved: the same command with this --workdir "
                "goes on"
            )
            return Ending("stopped", state)
        self.console.print(
            f"done: {num_steps - first_step} steps in {took}; step {num_steps} is saved"
        )
        return Ending("finished", state)

    def _compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        self.console.print("compiling the train step ...")
        start = time.monotonic()
        compiled = self.train_step.lower(state, batch).compile()
        peak = peak_memory_bytes(compiled)
        memory = "" if peak is None else f"; {peak / 2**20:,.0f} MiB a device at its peak"
        self.console.print(f"compiled in {time.monotonic() - start:.0f} s{memory}")
        return compiled


class StopSignal:
    """Makes SIGTERM and SIGINT wait for the step under way; a second one ends the process at once.

    Within `at_once`, where there is nothing to save, the first raises SystemExit with the code of a
    stopped run. With several processes jax listens for SIGTERM instead, from the moment they join,
    and they stop together; this only turns SIGINT into one.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.is_set = False
        self._processes = processes or Processes()
        self._is_at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if self._processes.count == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        else:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_due(self) -> bool:
        """Whether to stop before the next step.

        All processes ask as often, and get the same answer each time.
        """
        return self.is_set or self._processes.is_stopping()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work on the host alone; to leave while devices compute, by an exception, can
        crash the process.
        """
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    def _pass_on(self, number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    def _receive(self, number: int, _: Any) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)
        if self._is_at_once:
            raise SystemExit(EXIT_CODES["stopped"])


# Steps that devices may have before them: enough to never wait for the host. More only pile up, and
# on a CPU with many virtual devices they take each other's threads until a collective gives up.
STEPS_AHEAD = 2


class _TokenMeter:
    """Counts tokens, on the devices until they are asked for, and the time that training itself
    took.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._pending: list[jax.Array] = []
        self.restart()

    def add(self, tokens: jax.Array) -> None:
        """Those of a step that may be still under way; waits for the step before the last ones."""
        self._pending.append(tokens)
        if len(self._pending) > STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - STEPS_AHEAD])

    def read(self) -> dict[str, float]:
        """Tokens since the run began, and a second of the interval since `restart`."""
        new = sum(int(tokens) for tokens in self._pending)
        self._tokens, self._pending = self._tokens + new, []
        return {"tokens": self._tokens, "tokens_per_second": new / (time.monotonic() - self._since)}

    def restart(self) -> None:
        """Starts a new interval, so that evaluating and saving do not count as training."""
        self._since = time.monotonic()


def _to_host(metrics: dict[str, jax.Array]) -> Record:
    return {name: value.tolist() for name, value in jax.device_get(metrics).items()}
