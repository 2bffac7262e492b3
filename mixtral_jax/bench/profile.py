"""What the profiler of jax sees of steps: which operation of a program ran from when to when."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# How the profile names the time that the host gives to a step.
_STEP = "bench: a step"
_SECONDS = 1e-9


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of the operation `name`, or a step, from start to end in seconds."""

    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps as the host saw them, and the operations that the profiler saw on the devices."""

    steps: list[Span]
    operations: list[Span]


def profile_steps(run_step: Callable[[], object], count: int, module: str) -> Profile:
    """Profiles `count` steps.

    Args:
        run_step: runs a step and waits for it.
        module: the name of the program whose operations are meant.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # It would note every call, and slow the host down.
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(count):
                with jax.profiler.TraceAnnotation(_STEP):
                    run_step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return read_profile(jax.profiler.ProfileData.from_file(str(file)), module)


def read_profile(data: Any, module: str) -> Profile:
    """The steps, and the operations of the program `module`, in a `ProfileData` of jax.

    An accelerator has records of its own. What the host notes beside them is when it asked for an
    operation, so it counts for a CPU alone.
    """
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    operations = [span for plane in devices for span in _read_operations(plane, module)]
    if not operations:
        operations = [span for plane in planes for span in _read_operations(plane, module)]
    steps = [
        Span("", event.start_ns * _SECONDS, event.end_ns * _SECONDS)
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == _STEP
    ]
    return Profile(sorted(steps, key=lambda step: step.start), operations)


def _read_operations(plane: Any, module: str) -> Iterator[Span]:
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and stats.get("hlo_module") == module:
                name = str(stats["hlo_op"])
                yield Span(name, event.start_ns * _SECONDS, event.end_ns * _SECONDS)
