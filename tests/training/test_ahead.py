"""The devices never wait for the host: what the loop does in which order, seen by probes."""

import contextlib
import dataclasses
import gc
import itertools
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest

from mixtral_jax.config import CheckpointConfig, ConfigError, TrainConfig
from mixtral_jax.training.garbage import collect_only_when_asked
from mixtral_jax.training.loop import TrainLoop


class Metric:
    """A metric on a device: notes when it starts for the host, and when it is waited for."""

    def __init__(self, name, step, events):
        self.name, self.step, self.events = name, step, events

    def copy_to_host_async(self):
        if (self.step, self.name) not in self.events:  # jax starts a copy again before it waits.
            self.events.append((self.step, self.name))

    def __array__(self, *_, **__):
        assert (self.step, self.name) in self.events, "was not started before"
        if (waited := f"wait for {self.step}") not in self.events:
            self.events.append(waited)
        return np.asarray(5 if self.name == "tokens" else 0.5)


class Step:
    """Stands in for the train step: notes that it is given to the devices."""

    def __init__(self, events):
        self.events = events

    def lower(self, state, batch):
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return None

    def __call__(self, state, batch):
        number = state.step + 1
        self.events.append(f"give {number}")
        metrics = {name: Metric(name, number, self.events) for name in ("loss", "grad_norm")}
        return Mock(step=number), metrics | {"tokens": Metric("tokens", number, self.events)}


def stop_after(step):
    """Answers the question whether to stop, asked before the first step and after each."""
    answers = iter([False] * step + [True])
    return lambda: next(answers)


def config_of(num_steps, **intervals):
    return TrainConfig(num_steps=num_steps, batch_size=1, sequence_length=8, **intervals)


def batches_of(events, count=None):
    for number in itertools.count(1) if count is None else range(1, count + 1):
        events.append(f"batch {number}")
        yield Mock(), f"hash {number}"
    raise ConfigError("no token to learn")


def loop_of(events, **changes):
    """A loop over seven steps that logs all of them, and evaluates and saves after the last."""
    progress = MagicMock(__exit__=Mock(return_value=None))
    loop = TrainLoop(
        config=config_of(7, log_every=1, eval_every=7),
        checkpoint=CheckpointConfig(every=7),
        train_step=Step(events),
        batches=batches_of(events),
        evaluate=lambda model: events.append("evaluate") or {},
        checkpoints=Mock(save=lambda step, *_: events.append(f"save {step}")),
        log=Mock(write=lambda record: events.append(f"log {record['step']}")),
        progress=progress,
        is_stop_requested=lambda: False,
        record={"tokens": 100},
    )
    return dataclasses.replace(loop, **changes)


def test_a_step_is_waited_for_after_the_next_one_is_given_to_the_devices():
    events = []
    loop_of(events).run(Mock(step=0))
    for step in range(1, 7):
        waits = events.index(f"wait for {step}")
        assert events.index((step, "loss")) < events.index(f"batch {step + 1}")
        assert events.index(f"batch {step + 1}") < events.index(f"give {step + 1}") < waits
        assert waits < events.index(f"log {step}")
        assert step == 6 or events.index(f"log {step}") < events.index(f"give {step + 2}")
    assert events[-4:] == ["wait for 7", "evaluate", "log 7", "save 7"]


def test_of_a_step_without_a_record_the_host_reads_no_metric_and_two_may_be_queued():
    events = []
    config = config_of(7, log_every=7, eval_every=7)
    loop_of(events, config=config).run(Mock(step=0))
    for step in range(1, 6):
        assert events.index(f"give {step + 2}") < events.index(f"wait for {step}")
    assert not {(step, "loss") for step in range(1, 7)} & set(events)
    assert {(7, "loss"), (7, "grad_norm"), (7, "tokens")} <= set(events)


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ({"checkpoint": CheckpointConfig(every=3)}, ["log 3", "save 3"]),
        ({"config": config_of(7, log_every=1, eval_every=3)}, ["evaluate", "log 3"]),
        ({"is_stop_requested": stop_after(3)}, ["log 3", "save 3"]),
    ],
    ids=["a checkpoint", "an evaluation", "a stop"],
)
def test_what_needs_the_state_is_done_before_the_next_step_takes_it(changes, done):
    events = []
    loop_of(events, **changes).run(Mock(step=0))
    start = events.index("wait for 3")
    assert events[start - 1] != "give 4" and events[start + 1 : start + 3] == done


def test_tokens_are_counted_over_steps_with_and_without_a_record():
    rows = []
    config = config_of(7, log_every=3, eval_every=7)
    loop_of([], config=config, callbacks=[rows.append]).run(Mock(step=0))
    assert [(row["step"], row["tokens"], row["batch_hash"]) for row in rows] == [
        (3, 115, "hash 3"),
        (6, 130, "hash 6"),
        (7, 135, "hash 7"),
    ]


def test_steps_before_a_batch_that_cannot_be_made_are_told_of_before_the_error():
    rows = []
    loop = loop_of([], batches=batches_of([], count=3), callbacks=[rows.append])
    with pytest.raises(ConfigError, match="no token to learn"):
        loop.run(Mock(step=0))
    assert [row["step"] for row in rows] == [1, 2, 3]


@contextlib.contextmanager
def collections_in(events):
    """Notes each of Python's collections of garbage."""

    def note(phase, info):
        if phase == "start":
            events.append("collect")

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)


def make_garbage(count=50_000):
    """Objects in cycles: many more than Python lets pile up before it collects."""
    for _ in range(count):
        cycle = []
        cycle.append(cycle)


class WastefulStep(Step):
    """A step that leaves garbage."""

    def __call__(self, state, batch):
        result = super().__call__(state, batch)
        make_garbage()
        self.events.append(f"given {state.step + 1}")
        return result


def test_garbage_is_collected_after_a_record_is_told_and_never_elsewhere():
    events = []
    config = config_of(6, log_every=2, eval_every=6)
    with collections_in(events):
        loop_of(events, config=config, train_step=WastefulStep(events)).run(Mock(step=0))
    places = [events[at - 1] for at, event in enumerate(events) if event == "collect"]
    (first, *told) = places
    assert first == "batch 1" and told == ["log 2", "log 4", "save 6"]


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_collecting_is_afterwards_as_it_was_before(is_enabled, error):
    before, was_enabled = gc.get_freeze_count(), gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        with contextlib.suppress(RuntimeError), collect_only_when_asked():
            assert not gc.isenabled() and gc.get_freeze_count() > before
            if error:
                raise error
        # Some releases of Python freeze a few objects when they start.
        assert gc.isenabled() == is_enabled and gc.get_freeze_count() <= before
    finally:
        (gc.enable if was_enabled else gc.disable)()
