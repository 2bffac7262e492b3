#!/usr/bin/env bash
# Runs a command on every host of a Cloud TPU pod slice, and runs it again if it ends with 75.
#
#   TPU=NAME ZONE=ZONE launch/tpu_pod.sh setup GIT_URL
#   TPU=NAME ZONE=ZONE launch/tpu_pod.sh run train.py --config=configs/pretrain/mixtral_8x7b_v5p.py --workdir=RUN
#   TPU=NAME ZONE=ZONE launch/tpu_pod.sh stop
#
# jax finds the other hosts by the metadata of the slice. All hosts must mount the storage of RUN.
# `stop`, from another terminal, sends SIGTERM to every process: they save, and `run` ends with 75.
# Variables: FOLDER of the clone on the hosts, PYTHON in it, RESTART_SECONDS between starts.
# Exit codes: 0 (done), 2 (wrong command or config), 75 (stopped), or the code of a failed process.
set -u
folder=${FOLDER:-mixtral_jax}
python=${PYTHON:-.venv/bin/python}

usage() {
    echo "usage: TPU=NAME ZONE=ZONE launch/tpu_pod.sh setup GIT_URL | run train.py FLAGS... | stop" >&2
    exit 2
}

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

setup() {
    on_all_hosts "$(printf 'set -e; test -d %q || git clone %q %q; cd %q; git pull --ff-only' \
        "$folder" "$1" "$folder" "$folder"); make install; $python -m pip install --quiet -e '.[tpu]'"
}

# The script of each host: it starts one process, writes its id for `stop`, and prints its exit
# code, because gcloud does not return the codes of single hosts.
remote_script() {
    printf 'cd %q && rm -f .stopped || exit 2; ' "$folder"
    printf '%q ' "$python" "$@"
    # shellcheck disable=SC2016
    printf '%s' '& echo $! >.process; wait $!; code=$?; test -e .stopped && echo "host stopped on request"; '
    # shellcheck disable=SC2016
    printf '%s' 'echo "host ended with code $code"; exit $code'
}

run() {
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    while :; do
        on_all_hosts "$(remote_script "$@")" 2>&1 | tee "$log"
        codes=$(sed -n 's/.*host ended with code \([0-9]*\).*/\1/p' "$log" | sort -nu)
        case $codes in
            '')
                echo "error: no host reported an exit code: check that $TPU exists and is ready" \
                    "(a preempted slice must be created again)" >&2
                exit 1
                ;;
            0) exit 0 ;;
            75)
                if grep -q 'host stopped on request' "$log"; then exit 75; fi
                echo "all hosts stopped and saved (75): starting them again" >&2
                sleep "${RESTART_SECONDS:-10}"
                ;;
            *) exit "$(printf '%s\n' "$codes" | grep -vx -e 0 -e 75 | head -n 1 | grep . || echo 1)" ;;
        esac
    done
}

if [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then usage; fi
verb=${1:-}
[ $# -gt 0 ] && shift
case $verb in
    setup) [ $# -eq 1 ] || usage; setup "$1" ;;
    run) [ $# -ge 1 ] || usage; run "$@" ;;
    stop) on_all_hosts "$(printf 'cd %q' "$folder") && touch .stopped && kill -TERM \$(cat .process)" ;;
    *) usage ;;
esac
