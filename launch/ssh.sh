#!/usr/bin/env bash
# Starts one process of a run on each host by plain ssh, waits for all, and starts them again when they end with 75.
#
#   launch/ssh.sh HOSTS COMMAND...      as in: launch/ssh.sh hosts.txt .venv/bin/python train.py --workdir=/shared/run
#
# HOSTS is a file with a host a line; process 0 runs on the first, which the others must reach by that name.
# The clone lies in the folder of the same path on every host as here. SIGTERM or Ctrl-C here stops all processes,
# which save and end; so does a lost connection. Settings: PORT of the coordinator, RESTART_SECONDS between starts,
# GRACE_SECONDS for the others once one has failed.
# Ends with 0 (done), 2 (wrong command or config), 75 (stopped by a signal, and saved), or the code of what failed.
set -u

if [ $# -lt 2 ] || [ ! -r "$1" ]; then
    echo "usage: launch/ssh.sh HOSTS COMMAND...   (HOSTS: a file with a host a line)" >&2
    exit 2
fi
mapfile -t hosts < <(grep -v '^[[:space:]]*\(#\|$\)' "$1")
shift
if [ ${#hosts[@]} -eq 0 ]; then
    echo "error: the file of hosts names none" >&2
    exit 2
fi
first=${hosts[0]#*@}
folder=$PWD
scratch=$(mktemp -d)
is_stopping=
trap 'is_stopping=1; stop_all' TERM INT
trap 'stop_all; rm -rf "$scratch"' EXIT

# The remote shell ends its process when its standard input does: ssh hands no signals on.
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
    # While this lives, the input of every ssh stays open.
    sleep infinity >"$scratch/input" &
    holder=$!
    for index in "${!hosts[@]}"; do
        start_one "$index" "$(remote_script "$@" \
            "--coordinator=$first:${PORT:-8476}" "--num_processes=${#hosts[@]}" "--process_id=$index")" &
    done
}

start_one() {
    ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[$1]}" "$2" <"$scratch/input"
    # The code of a process, in a file that appears whole.
    echo $? >"$scratch/code-$1"
    mv "$scratch/code-$1" "$scratch/ended/"
}

stop_all() {
    [ -n "${holder:-}" ] && kill "$holder" 2>/dev/null
    holder=
}

# Sets `code` to what all ended with, or to the first that is neither 0 nor 75.
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
        # The others end by themselves, unless they wait for one that never started.
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
    echo "all processes stopped and saved (75): starting again" >&2
    sleep "${RESTART_SECONDS:-10}"
done
