"""How the cost of a train step grows with tokens, sequence length, experts, layers and devices."""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import numpy as np

from mixtral_jax.bench.step import count_cores, make_own_training, make_up_batch
from mixtral_jax.config import Config, MeshConfig
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh

NUM_WARMUP_STEPS, NUM_MEASURED_STEPS = 1, 5
# Above this power of its size, a cost is warned of.
LARGEST_EXPONENT = 1.1
# Below this share of the machine's cores, a row is warned of.
LEAST_BUSY = 0.9


@dataclasses.dataclass(frozen=True)
class Case:
    """A config to measure on the first `num_devices` devices."""

    config: Config
    num_devices: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """The wall time of a step, and how many cores it kept busy: processor time over wall time."""

    seconds: float
    busy_cores: float


def make_series(config: Config, num_devices: int) -> dict[str, dict[int, Case]]:
    """The cases by what grows and by its size: the config, made larger in one direction at a time.

    Only the last direction is measured on more than one device.
    """
    train, model = config.train, config.model
    rows, length, layers = train.batch_size, train.sequence_length, model.num_layers

    def in_train(**changes: int) -> Case:
        return Case(dataclasses.replace(config, train=dataclasses.replace(train, **changes)))

    def in_model(**changes: int) -> Case:
        return Case(dataclasses.replace(config, model=dataclasses.replace(model, **changes)))

    return {
        "tokens": {n * rows * length: in_train(batch_size=n * rows) for n in (1, 4, 16)},
        "sequence length": {n * length: in_train(sequence_length=n * length) for n in (1, 4, 16)},
        "experts": {n: in_model(num_experts=n) for n in (8, 16, 64)},
        "layers": {n * layers: in_model(num_layers=n * layers) for n in (1, 2, 4)},
        "devices": {n: Case(config, n) for n in (1, 2, 4, 8) if n <= num_devices},
    }


def measure_growth(config: Config) -> dict[str, Any]:
    """Measures every case, and fits `constant * size ** exponent` to the cost in each direction.

    Raises:
        ConfigError: a case does not fit on its devices.
    """
    measure = functools.cache(measure_cost)  # The config as it is belongs to several directions.
    growth = {}
    for direction, cases in make_series(config, jax.device_count()).items():
        costs = {size: measure(case) for size, case in cases.items()}
        growth[direction] = {
            "rows": [{"size": size} | dataclasses.asdict(cost) for size, cost in costs.items()],
            "exponent": fit_exponent({size: cost.seconds for size, cost in costs.items()}),
        }
    return {"cores": count_cores(jax.devices()[0]), "growth": growth}


def measure_cost(case: Case) -> Cost:
    """Compiles and runs the step of a case, on a mesh that depends on its number of devices."""
    config = dataclasses.replace(case.config, mesh=MeshConfig())
    config = resolve_mesh(config, case.num_devices)
    mesh = make_mesh(config.mesh, jax.devices()[: case.num_devices])
    training = make_own_training(config, mesh)
    with jax.set_mesh(mesh):
        state, batch = training.init(), make_up_batch(config, mesh)
        step = training.train_step.lower(state, batch).compile()
        walls, processors = [], []
        for _ in range(NUM_WARMUP_STEPS + NUM_MEASURED_STEPS):
            wall, processor = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(step(state, batch))
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
    walls, processors = walls[NUM_WARMUP_STEPS:], processors[NUM_WARMUP_STEPS:]
    return Cost(statistics.median(walls), sum(processors) / sum(walls))


def fit_exponent(costs: dict[int, float]) -> float | None:
    """The slope of the logarithm of the cost over that of the size, by least squares.

    None if there are not two sizes.
    """
    if len(costs) < 2:
        return None
    slope, _ = np.polyfit(np.log(list(costs)), np.log(list(costs.values())), 1)
    return float(slope)


def describe_growth(figures: dict[str, Any]) -> str:
    """A table for people, and a line for each warning."""
    lines = [f"{'':<16}{'size':>10}{'seconds':>11}{'busy cores':>12}{'exponent':>10}"]
    warnings = []
    cores = figures["cores"]
    for direction, found in figures["growth"].items():
        exponent, name = found["exponent"], direction
        for row in found["rows"]:
            is_last = row is found["rows"][-1]
            fitted = f"{exponent:10.2f}" if is_last and exponent is not None else ""
            seconds, busy = row["seconds"], row["busy_cores"]
            lines.append(f"{name:<16}{row['size']:>10,}{seconds:>11.4f}{busy:>12.2f}{fitted}")
            name = ""
            if cores and busy < LEAST_BUSY * cores:
                warnings.append(
                    f"warning: {direction} {row['size']:,}: {busy:.2f} of {cores} cores are busy"
                )
        if exponent is not None and exponent > LARGEST_EXPONENT:
            warnings.append(
                f"warning: the cost grows with {direction} to the power {exponent:.2f}, which is "
                f"over {LARGEST_EXPONENT}"
            )
    return "\n".join([*lines, *warnings])
