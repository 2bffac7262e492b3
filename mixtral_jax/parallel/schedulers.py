"""What a scheduler or a launcher tells the processes that it starts, by environment variables.

jax joins the processes of some of them by itself. If it does not know a launcher, each of its
processes would train by itself, so that is refused. Does not import jax.
"""

import dataclasses
import os
import re

from mixtral_jax.config import ConfigError

_PROCESS_FLAGS = "--coordinator, --num_processes and --process_id"
_WITHOUT_TORCHRUN = f"start it without torchrun, once on each host, with {_PROCESS_FLAGS}"
_WITH_SRUN = "start the program by srun, once per task"


@dataclasses.dataclass(frozen=True)
class _Variables:
    """The variables by which a launcher tells a process its rank and how many there are.

    Attributes:
        launcher: as users know it.
        rank: its value is below the number of processes, from 0.
        sizes: the number of processes; the first one that is set holds. Empty: none tells it.
        fix: what to do if the processes did not meet; None: to give the rank as a flag.
        is_whole: the numbers are of all processes, and not of those of a machine, or of machines.
    """

    launcher: str
    rank: str
    sizes: tuple[str, ...] = ()
    fix: str | None = None
    is_whole: bool = True


# One launcher may start processes inside a job of another, whose variables they then have as well.
# If several launchers tell of equally many processes, the first in this list is named. Open MPI,
# for one, also sets the variables of PMI.
_VARIABLES = (
    _Variables("torchrun", "RANK", ("WORLD_SIZE",), _WITHOUT_TORCHRUN),
    _Variables("torchrun", "GROUP_RANK", ("GROUP_WORLD_SIZE",), _WITHOUT_TORCHRUN, is_whole=False),
    _Variables("torchrun", "LOCAL_RANK", ("LOCAL_WORLD_SIZE",), _WITHOUT_TORCHRUN, is_whole=False),
    # A shell that Slurm opens in a job is a step of one task, whatever the job may have.
    _Variables(
        "Slurm",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        _WITH_SRUN,
    ),
    _Variables("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    _Variables("MVAPICH", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
    _Variables("MPICH", "PMI_RANK", ("PMI_SIZE",)),
    _Variables("PMIx", "PMIX_RANK"),
    _Variables("Horovod", "HOROVOD_RANK", ("HOROVOD_SIZE",)),
    _Variables("Flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",)),
    _Variables("JSM", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",)),
    _Variables("PALS", "PALS_RANKID"),
    _Variables("ALPS", "ALPS_APP_PE"),
    _Variables("MPI", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), is_whole=False),
    # jax itself reads none of these, but scripts set them.
    _Variables("the environment", "JAX_PROCESS_ID", ("JAX_NUM_PROCESSES",)),
    _Variables("the environment", "JAX_PROCESS_INDEX", ("JAX_PROCESS_COUNT",)),
    _Variables("the environment", "NODE_RANK", ("NNODES",), is_whole=False),
    # An indexed Job tells each pod its index, but not how many pods there are.
    _Variables(
        "Kubernetes",
        "JOB_COMPLETION_INDEX",
        fix=f"give {_PROCESS_FLAGS}, as launch/kubernetes.yaml does",
    ),
)


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a scheduler tells its processes. A number that it does not tell is None.

    Attributes:
        name: as users know it.
        num_machines: machines, or pods, that run the processes.
        num_processes: all processes of the job, or a lower bound: one more than a rank.
        fix: what to do if fewer processes met.
        variable: the one that tells of the processes.
        is_lower_bound: there may be more processes than `num_processes`.
    """

    name: str
    num_machines: int | None
    num_processes: int | None
    fix: str = "start one process on each host"
    variable: str | None = None
    is_lower_bound: bool = False

    def describe_missing(self, num_met: int) -> str | None:
        """One line if fewer processes met than this scheduler started, otherwise None."""
        expected = self.num_processes
        if expected is None or num_met >= expected:
            return None
        count = f"at least {expected}" if self.is_lower_bound else f"{expected}"
        told = f" ({self.variable}={os.environ.get(self.variable)})" if self.variable else ""
        return f"{self.name} says there are {count} processes{told}, but {num_met} met"


def find_scheduler() -> Scheduler | None:
    """The scheduler that started this process, found by the environment that it sets, or None.

    Of several, the one that tells of the most processes.
    """
    found = [scheduler for each in _VARIABLES if (scheduler := _read(each))]
    if "TPU_WORKER_HOSTNAMES" in os.environ:
        hosts = len(os.environ["TPU_WORKER_HOSTNAMES"].split(","))
        found.append(Scheduler("Cloud TPU", hosts, hosts, variable="TPU_WORKER_HOSTNAMES"))
    if not found and "SLURM_JOB_ID" in os.environ:
        found.append(Scheduler("Slurm", _count_machines("Slurm", None), None, _WITH_SRUN))
    return max(found, key=lambda scheduler: scheduler.num_processes or 0, default=None)


def _read(variables: _Variables) -> Scheduler | None:
    """What these variables tell; None if none of them is set to a number."""
    rank, told = _number(variables.rank), variables.rank
    count = None if rank is None else rank + 1
    is_lower_bound = True
    for name in variables.sizes:
        size = _number(name)
        if size is not None:
            count, told, is_lower_bound = size, name, not variables.is_whole
            break
    if count is None:
        return None
    fix = variables.fix or f"give {_PROCESS_FLAGS}; the id is in {variables.rank}"
    fix += f", or unset {told} if this process is the only one"
    machines = _count_machines(variables.launcher, count)
    return Scheduler(variables.launcher, machines, count, fix, told, is_lower_bound)


def _count_machines(launcher: str, count: int | None) -> int | None:
    """The number of machines that a launcher tells of, where it starts `count` processes."""
    if launcher == "torchrun":
        return _number("GROUP_WORLD_SIZE")
    if launcher == "Slurm":
        return _number("SLURM_STEP_NUM_NODES") or _number("SLURM_JOB_NUM_NODES")
    local = {"Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE", "MVAPICH": "MV2_COMM_WORLD_LOCAL_SIZE"}
    here = _number(local[launcher]) if launcher in local else None
    return -(-count // here) if count and here else None


def _number(name: str) -> int | None:
    """The value of a variable, if it is set to a whole number."""
    value = os.environ.get(name, "")
    return int(value) if re.fullmatch("[0-9]+", value) else None


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
