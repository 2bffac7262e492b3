"""The launch kits are well formed: shellcheck finds nothing, and the Job keeps its promises."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("name", ["ssh.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_shellcheck_finds_nothing(name):
    program = shutil.which(
        "shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    )
    assert program, "the `test` extra brings it: make install"
    done = subprocess.run([program, str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(LAUNCH / name, os.X_OK)


@pytest.fixture(scope="module")
def documents():
    return {
        one["kind"]: one for one in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    }


def test_the_job_has_the_keys_of_its_api_and_no_others(documents):
    """Servers that do not validate silently drop a misspelt key."""
    job, service = documents["Job"], documents["Service"]
    assert (job["apiVersion"], service["apiVersion"]) == ("batch/v1", "v1")
    assert set(job) == set(service) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(service["spec"]) == {"clusterIP", "publishNotReadyAddresses", "selector", "ports"}
    assert set(job["spec"]) == {
        "completionMode",
        "completions",
        "parallelism",
        "backoffLimit",
        "podReplacementPolicy",
        "podFailurePolicy",
        "template",
    }
    pod = job["spec"]["template"]["spec"]
    assert set(pod) == {
        "subdomain",
        "restartPolicy",
        "terminationGracePeriodSeconds",
        "containers",
        "volumes",
    }
    assert set(pod["containers"][0]) == {
        "name",
        "image",
        "workingDir",
        "env",
        "command",
        "args",
        "ports",
        "resources",
        "volumeMounts",
    }


def test_the_pods_of_the_job_find_process_0(documents):
    job, service = documents["Job"], documents["Service"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["spec"]["completionMode"] == "Indexed"
    # A headless service with the subdomain of the pods gives pod 0 its name before it is ready.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    port = service["spec"]["ports"][0]["port"]
    assert container["ports"] == [{"containerPort": port}]
    (command,) = container["args"]
    assert f"--coordinator={name}-0.{pod['subdomain']}:{port} " in command
    assert '--process_id="$JOB_COMPLETION_INDEX"' in command
    count = {variable["name"]: variable["value"] for variable in container["env"]}["NUM_PROCESSES"]
    assert int(count) == job["spec"]["completions"] == job["spec"]["parallelism"]
    # Without exec, the shell would get SIGTERM instead of Python.
    assert command.startswith("exec ")
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_exit_75_starts_a_pod_again_and_2_fails_the_job(documents):
    spec = documents["Job"]["spec"]
    pod = spec["template"]["spec"]
    actions = {}
    rules = spec["podFailurePolicy"]["rules"]
    # Up to Kubernetes 1.33 the status is required.
    assert rules[-1] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    for rule in rules:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            actions |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert actions == {2: "FailJob", 75: "Ignore"}
    # The API requires both of a Job with a podFailurePolicy.
    assert pod["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod["terminationGracePeriodSeconds"] >= 120
