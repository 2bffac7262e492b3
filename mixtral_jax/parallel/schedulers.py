"""What a scheduler or a launcher tells the processes that it starts, by environment variables.

jax joins the processes of some of them by itself. If it does not know a launcher, each of its
processes would train by itself, so that is refused. Does not import jax.
"""

import dataclasses
import os
import re

from mixtral_jax.config import ConfigError

# The name of each MPI, and how the variables begin that it gives to its processes. Open MPI comes
# first, since it gives those of PMI as well.
_MPI_PREFIXES = {"Open MPI": "OMPI_COMM_WORLD", "MVAPICH": "MV2_COMM_WORLD", "MPICH": "PMI"}
_PROCESS_FLAGS = "--coordinator, --num_processes and --process_id"


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a scheduler tells its processes. A number that it does not tell is None.

    Attributes:
        name: as users know it.
        num_machines: machines, or pods, that run the processes.
        num_processes: all processes of the job. An indexed Kubernetes Job tells only a lower bound.
        fix: what to do if fewer processes met.
    """

    name: str
    num_machines: int | None
    num_processes: int | None
    fix: str = "start one process on each host"

    def describe_missing(self, num_met: int) -> str | None:
        """One line if fewer processes met than this scheduler started, otherwise None."""
        expected = self.num_processes
        is_lower_bound = self.name == "Kubernetes"
        if expected is None or num_met == expected or (is_lower_bound and num_met > expected):
            return None
        return f"{self.name} says there are {expected} processes, but {num_met} met"


def find_scheduler() -> Scheduler | None:
    """The scheduler that started this process, found by the environment that it sets, or None."""

    def number(name: str) -> int | None:
        value = os.environ.get(name, "")
        return int(value) if re.fullmatch("[0-9]+", value) else None

    # It may run inside a job of the others, whose variables its processes then have as well.
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        fix = f"start it without torchrun, once on each host, with {_PROCESS_FLAGS}"
        return Scheduler("torchrun", number("GROUP_WORLD_SIZE"), number("WORLD_SIZE"), fix)
    if "SLURM_JOB_ID" in os.environ:
        nodes = number("SLURM_STEP_NUM_NODES") or number("SLURM_JOB_NUM_NODES")
        fix = "start the program by srun, once per task"
        return Scheduler("Slurm", nodes, number("SLURM_NTASKS"), fix)
    for name, prefix in _MPI_PREFIXES.items():
        size, here = number(f"{prefix}_SIZE"), number(f"{prefix}_LOCAL_SIZE")
        if size is not None:
            fix = f"give {_PROCESS_FLAGS}; the id is in {prefix}_RANK"
            return Scheduler(name, -(-size // here) if here else None, size, fix)
    if "TPU_WORKER_HOSTNAMES" in os.environ:
        hosts = len(os.environ["TPU_WORKER_HOSTNAMES"].split(","))
        return Scheduler("Cloud TPU", hosts, hosts)
    if "JOB_COMPLETION_INDEX" in os.environ:
        # An indexed Job tells each pod its index, but not how many pods there are.
        fix = f"give {_PROCESS_FLAGS}, as launch/kubernetes.yaml does"
        return Scheduler("Kubernetes", None, (number("JOB_COMPLETION_INDEX") or 0) + 1, fix)
    return None


def find_local_device_ids() -> list[int] | None:
    """The ids of all GPUs of a node, if this process is the node's only Slurm task.

    jax would give such a task the first GPU alone. None leaves the choice to jax.
    """
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    is_only_task = tasks is not None and tasks == nodes
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or not gpus.isdigit() or not is_only_task:
        return None
    return list(range(int(gpus)))


def require_all_met(num_met: int) -> None:
    """Raises ConfigError if a scheduler started more processes than the `num_met` of this run."""
    scheduler = find_scheduler()
    missing = scheduler and scheduler.describe_missing(num_met)
    if scheduler and missing:
        raise ConfigError(f"{missing}, which would train without the others: {scheduler.fix}")
