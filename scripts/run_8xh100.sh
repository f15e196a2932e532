#!/usr/bin/env bash
# A run on one machine that survives signals and crashes of ranks: RUN_ID=name bash scripts/run_8xh100.sh
# Settings are environment variables, as always. The same command again goes on with RUN_ID, from its newest checkpoint.
# Of the launcher: NPROC_PER_NODE (8), MAX_RESTARTS (3), SHUTDOWN_TIMEOUT (180, seconds), RENDEZVOUS (--standalone).
# How the run ended is the status in logs/<run_id>.json: torchrun returns 1 after any signal, also when all was saved.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun=torchrun
[ ! -x .venv/bin/torchrun ] || torchrun=.venv/bin/torchrun

export RUN_ID=${RUN_ID:-run-$(date -u +%Y%m%d-%H%M%S)-$$}  # every attempt goes on with it
export RESUME=${RESUME:-auto}
# Seconds from a signal to SIGKILL: a step, or the rest of one save and then another, must fit in. The variable, not the
# option, because a torch before 2.12 has neither, refuses the option and stays at 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-180}

signals=(TERM INT HUP QUIT USR1)
options=(
    # One machine, any free port: two runs on it do not meet. Several machines need more than one word, hence no quotes.
    ${RENDEZVOUS:---standalone}
    --nproc_per_node="${NPROC_PER_NODE:-8}"
    --max-restarts=0  # a rank that torchrun starts again may look for one that is gone: below, all start again
    # Passed on to the ranks. Without SIGUSR1 here, that signal kills the launcher and leaves its ranks behind.
    --signals-to-handle="$(printf 'SIG%s,' "${signals[@]}" | sed 's/,$//')"
    --log-dir="${LOG_DIR:-logs}/torchrun"
    --tee=2  # each rank's stderr is shown and kept there; its stdout, already in logs/<run_id>.txt, is only shown
)
((${MAX_RESTARTS:=3})) || exec "$torchrun" "${options[@]}" train_gpt.py "$@"

launcher='' signalled=''
pass_on() {
    signalled=1
    [ -z "$launcher" ] || kill -s "$1" "$launcher" 2> /dev/null || true
}
for name in "${signals[@]}"; do
    trap "pass_on $name" "$name"
done

summary=${LOG_DIR:-logs}/$RUN_ID.json
for ((attempt = 0; ; attempt++)); do
    before=$(cat "$summary" 2> /dev/null || true)
    "$torchrun" "${options[@]}" train_gpt.py "$@" &
    launcher=$!
    code=0
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2> /dev/null; do  # a signal ends `wait`, not the launcher
        code=0
        wait "$launcher" || code=$?
    done
    [ "$code" -ne 0 ] && [ -z "$signalled" ] || exit "$code"

    # What counts is the status that this attempt has written: these would fail again.
    after=$(cat "$summary" 2> /dev/null || true)
    status=$(sed -n 's/^ *"status": "\([a-z]*\)".*/\1/p' <<< "$after")
    [ "$after" != "$before" ] || status=''
    case $status in
        config) exit 2 ;;
        data) exit 3 ;;
        diverged) exit 4 ;;
        oom) exit 5 ;;
    esac
    ((attempt < MAX_RESTARTS)) || exit "$code"
    echo "$RUN_ID: status ${status:-unknown}; restart $((attempt + 1)) of $MAX_RESTARTS" >&2
done
