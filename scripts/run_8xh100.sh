#!/usr/bin/env bash
# A run on one machine that survives signals and crashes of ranks: RUN_ID=name bash scripts/run_8xh100.sh
# Settings are environment variables, as always. The same command again goes on with RUN_ID, from its newest checkpoint.
# Of the launcher: NPROC_PER_NODE (8), MAX_RESTARTS (3), SHUTDOWN_TIMEOUT (180, seconds), RENDEZVOUS (--standalone).
# How the run ended is the status in logs/<run_id>.json: torchrun returns 1 after any signal, also when all was saved.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun=torchrun
[ ! -x .venv/bin/torchrun ] || torchrun=.venv/bin/torchrun

export RESUME=${RESUME:-auto}  # restarts are of use only where they go on
# Seconds from a signal to SIGKILL: a step, or the rest of one save and then another, must fit in. The variable, not the
# option, because a torch before 2.12 has neither, refuses the option and stays at 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-180}

options=(
    # One machine, any free port: two runs on it do not meet. Several machines need more than one word, hence no quotes.
    ${RENDEZVOUS:---standalone}
    --nproc_per_node="${NPROC_PER_NODE:-8}"
    --max-restarts="${MAX_RESTARTS:-3}"  # of all ranks when one crashes; a refused or diverged run is not tried again
    # Passed on to the ranks. Without SIGUSR1 here, that signal kills the launcher and leaves its ranks behind.
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    --log-dir="${LOG_DIR:-logs}/torchrun"
    --tee=2  # each rank's stderr is shown and kept there; its stdout, already in logs/<run_id>.txt, is only shown
)
exec "$torchrun" "${options[@]}" train_gpt.py "$@"
