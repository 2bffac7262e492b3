"""launch/tpu_pod.sh, with a gcloud that logs its arguments and runs the command for two hosts."""

import time

import pytest

GCLOUD = """
echo "${@:1:7}" >>"$0.calls"
command=${!#}; command=${command#--command=}
for host in 0 1; do (cd "$HOSTS/$host" && HOST=$host exec sh -c "$command") & done
wait
"""


@pytest.fixture
def pod(kit):
    kit.program("gcloud", GCLOUD)
    for host in range(2):
        (kit.folder / f"{host}" / "mixtral_jax").mkdir(parents=True)
    return kit


def run(pod, *arguments, work="true"):
    return pod.run(
        "tpu_pod.sh", *arguments, TPU="pod", ZONE="zone", HOSTS=str(pod.folder), PYTHON=str(work)
    )


def per_host(pod, *codes):
    """Ends with the next of `codes` at each start of its host."""
    return pod.program(
        "work",
        f"""
        echo "$@" >>"{pod.folder}/calls-$HOST"; codes=({" ".join(map(str, codes))})
        exit "${{codes[$(wc -l <"{pod.folder}/calls-$HOST") - 1]}}"
    """,
    )


@pytest.mark.parametrize(
    ("codes", "code", "starts"), [((75, 0), 0, 2), ((75, 2), 2, 2), ((2,), 2, 1), ((1,), 1, 1)]
)
def test_75_starts_all_hosts_again_and_nothing_else_does(pod, codes, code, starts):
    ended, _, errors = run(pod, "run", "train.py", "--workdir=a b", work=per_host(pod, *codes))
    assert ended == code, errors
    assert pod.calls(0) == pod.calls(1) == ["train.py --workdir=a b"] * starts
    calls = (pod.bin / "gcloud.calls").read_text().splitlines()
    assert calls == ["compute tpus tpu-vm ssh pod --zone=zone --worker=all"] * starts


def test_a_slice_that_is_gone_is_a_failure(pod):
    pod.program("gcloud", "echo 'NOT_FOUND: no such TPU' >&2; exit 1")
    code, _, errors = run(pod, "run", "train.py")
    assert code == 1
    assert "check that pod exists" in errors


def test_stop_ends_every_process_with_75_and_starts_none_again(pod):
    work = pod.program(
        "work", f'trap "exit 75" TERM; touch "{pod.folder}/up$HOST"; while :; do sleep 0.1; done'
    )
    process = pod.start(
        "tpu_pod.sh",
        "run",
        "train.py",
        TPU="pod",
        ZONE="zone",
        HOSTS=str(pod.folder),
        PYTHON=str(work),
    )
    deadline = time.monotonic() + 60
    while len(list(pod.folder.glob("up*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(pod, "stop")[0] == 0
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.parametrize("arguments", [(), ("run",), ("setup",), ("fly",)])
def test_wrong_usage_is_2(pod, arguments):
    assert run(pod, *arguments)[0] == 2
