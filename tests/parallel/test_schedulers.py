"""Launchers are known by their variables, and processes that they start do not train alone."""

import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from mixtral_jax.parallel import processes
from mixtral_jax.parallel.coordinator import Launch
from mixtral_jax.parallel.schedulers import find_local_device_ids, find_scheduler, require_all_met
from mixtral_jax.runs.checkup import check_launch


def set_variables(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "4", "SLURM_NTASKS": "4"}, ("Slurm", 4, 4)),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, ("Slurm", 2, None)),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("Open MPI", 2, 8)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"}, ("Open MPI", None, 2)),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, ("MPICH", None, 4)),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_SIZE": "4"}, ("MVAPICH", 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}, ("torchrun", 2, 8)),
        ({"WORLD_SIZE": "8"}, ("torchrun", None, 8)),
        ({"RANK": "3"}, ("torchrun", None, 4)),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "4"}, ("Slurm", None, 4)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ("Slurm", None, 1)),
        ({"PMIX_RANK": "1"}, ("PMIx", None, 2)),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, ("Cloud TPU", 3, 3)),
        ({"JOB_COMPLETION_INDEX": "3"}, ("Kubernetes", None, 4)),
    ],
)
def test_schedulers_are_known_by_their_variables(monkeypatch, variables, expected):
    set_variables(monkeypatch, variables)
    found = find_scheduler()
    assert (found and (found.name, found.num_machines, found.num_processes)) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
            list(range(8)),
        ),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, None),
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_GPUS_ON_NODE": "8",
                "JAX_LOCAL_DEVICE_IDS": "3",
            },
            None,
        ),
    ],
)
def test_the_only_slurm_task_of_a_node_gets_all_its_gpus(monkeypatch, variables, expected):
    """jax alone would give it one GPU, because it takes SLURM_LOCALID for the number of a GPU."""
    set_variables(monkeypatch, variables)
    assert find_local_device_ids() == expected


SEVERAL = {
    "torchrun": {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
    "torchrun in a Slurm job": {"RANK": "0", "WORLD_SIZE": "8", "SLURM_JOB_ID": "7"},
    "a PyTorchJob of Kubernetes": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0"},
    "Open MPI 5": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "0"},
    "Slurm without srun": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    "Slurm with other names": {"SLURM_PROCID": "0", "SLURM_NPROCS": "4"},
    "a step of Slurm": {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
    "torchrun in a job of one task": {"WORLD_SIZE": "2", "SLURM_NTASKS": "1"},
    "a job of Slurm for one rank": {"RANK": "0", "WORLD_SIZE": "1", "SLURM_NTASKS": "4"},
    "an indexed Job": {"JOB_COMPLETION_INDEX": "1"},
}
# One of these variables is enough: a rank above 0, or a size above 1.
RANKS_AND_SIZES = [
    ("RANK", "WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("GROUP_RANK", "GROUP_WORLD_SIZE"),
    ("NODE_RANK", "NNODES"),
    ("PMIX_RANK", None),
    ("PMI_RANK", "PMI_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("PALS_RANKID", None),
    ("ALPS_APP_PE", None),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("JAX_PROCESS_INDEX", "JAX_PROCESS_COUNT"),
]
for rank, size in RANKS_AND_SIZES:
    SEVERAL[rank] = {rank: "1"}
    if size:
        SEVERAL[size] = {size: "2"}
INNOCENT = [
    *({rank: "0"} | ({size: "1"} if size else {}) for rank, size in RANKS_AND_SIZES),
    {"RANK": "", "WORLD_SIZE": "many"},
    {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
]


SAID = r"says there are (at least )?\d processes \(\w+=\d\), but 1 met"


@pytest.mark.parametrize("variables", SEVERAL.values(), ids=SEVERAL)
def test_one_of_several_processes_that_did_not_meet_is_refused(monkeypatch, variables):
    def find_no_cluster(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", find_no_cluster)
    assert processes.join_processes(Launch()).count == 1
    set_variables(monkeypatch, variables)
    with pytest.raises(ConfigError, match=SAID) as error:
        processes.join_processes(Launch())
    assert "--process_id" in str(error.value) or "srun" in str(error.value)
    # The doctor reports it among other problems.
    alone = processes.join_processes(Launch(), requires_all=False)
    (problem,) = check_launch(alone, find_scheduler())
    assert problem.fix and problem.what in str(error.value)


@pytest.mark.parametrize("variables", INNOCENT, ids=str)
def test_a_process_that_no_variable_calls_one_of_several_may_be_alone(monkeypatch, variables):
    set_variables(monkeypatch, variables)
    require_all_met(1)


@pytest.mark.parametrize(("name", "kind"), [("train", "pretrain"), ("tune", "instruct")])
def test_a_notebook_function_does_not_train_alone_either(monkeypatch, tmp_path, name, kind):
    set_variables(monkeypatch, SEVERAL["torchrun"])
    config = mixtral_jax.load_config(f"configs/{kind}/tiny.py")
    with pytest.raises(ConfigError, match=r"torchrun says there are 2 processes \(WORLD_SIZE=2\)"):
        getattr(mixtral_jax, name)(config, workdir=tmp_path)


def test_all_processes_that_met_go_on(monkeypatch):
    require_all_met(1)
    set_variables(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "8"})
    require_all_met(8)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    # An indexed Job tells only the highest index seen.
    set_variables(monkeypatch, {"JOB_COMPLETION_INDEX": "1"})
    require_all_met(4)
