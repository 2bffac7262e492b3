#!/usr/bin/env bash
# Starts one process of a run on each host by ssh, and restarts all if they end with 75.
#
#   launch/ssh.sh HOSTS COMMAND...
#   launch/ssh.sh hosts.txt .venv/bin/python train.py --workdir=/shared/run
#
# HOSTS is a file with one host per line. Process 0 runs on the first host, which the others must
# reach by that name. The clone must have the same path on every host as here. SIGTERM or Ctrl-C here
# stops all processes, which save and end. So does a lost connection.
# Variables: PORT of the coordinator, RESTART_SECONDS between starts, GRACE_SECONDS for the other
# processes to end after one has failed.
# Exit codes: 0 (done), 2 (wrong command or config), 75 (stopped by a signal, and saved), or the
# code of the process that failed.
set -u

if [ $# -lt 2 ] || [ ! -r "$1" ]; then
    echo "usage: launch/ssh.sh HOSTS COMMAND...   (HOSTS: a file with one host per line)" >&2
    exit 2
fi
mapfile -t hosts < <(grep -v '^[[:space:]]*\(#\|$\)' "$1")
shift
if [ ${#hosts[@]} -eq 0 ]; then
    echo "error: the file of hosts is empty: write one host per line" >&2
    exit 2
fi
first=${hosts[0]#*@}
folder=$PWD
scratch=$(mktemp -d)
is_stopping=
trap 'is_stopping=1; stop_all' TERM INT
trap 'stop_all; rm -rf "$scratch"' EXIT

# ssh forwards no signals. So the remote shell stops its process when its standard input ends.
remote_script() {
    printf 'cd %q || exit 2\n' "$folder"
    printf 'exec 3<&0\n'
    printf '%q ' "$@"
    printf '</dev/null 3<&- &\n'
    # shellcheck disable=SC2016
    printf '%s\n' 'process=$!' '(cat; kill -TERM $process) <&3 >/dev/null 2>&1 &' 'exec 3<&-' 'wait $process'
}

start_all() {
    rm -rf "$scratch/input" "$scratch/ended"
    mkdir "$scratch/ended"
    mkfifo "$scratch/input"
    # While this process lives, the input of every ssh stays open.
    sleep infinity >"$scratch/input" &
    holder=$!
    for index in "${!hosts[@]}"; do
        start_one "$index" "$(remote_script "$@" \
            "--coordinator=$first:${PORT:-8476}" "--num_processes=${#hosts[@]}" "--process_id=$index")" &
    done
}

start_one() {
    ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[$1]}" "$2" <"$scratch/input"
    # The exit code appears as a complete file, because mv is atomic.
    echo $? >"$scratch/code-$1"
    mv "$scratch/code-$1" "$scratch/ended/"
}

stop_all() {
    [ -n "${holder:-}" ] && kill "$holder" 2>/dev/null
    holder=
}

# Sets `code` to the exit code of all processes, or to the first one that is neither 0 nor 75.
wait_for_all() {
    code=0
    patience=${GRACE_SECONDS:-30}
    while :; do
        ended=0
        for file in "$scratch"/ended/*; do
            [ -e "$file" ] || continue
            ended=$((ended + 1))
            case $(cat "$file") in
                0) ;;
                75) [ "$code" -eq 0 ] && code=75 ;;
                *) case $code in 0 | 75) code=$(cat "$file") ;; esac ;;
            esac
        done
        [ "$ended" -eq ${#hosts[@]} ] && return
        # The others end by themselves, unless they wait for a process that never started.
        case $code in
            0 | 75) ;;
            *) patience=$((patience - 1)) ;;
        esac
        [ "$patience" -lt 0 ] && stop_all
        sleep 1
    done
}

while :; do
    start_all "$@"
    wait_for_all
    stop_all
    if [ "$code" -ne 75 ] || [ -n "$is_stopping" ]; then
        exit "$code"
    fi
    echo "all processes stopped and saved (75): starting them again" >&2
    sleep "${RESTART_SECONDS:-10}"
done
