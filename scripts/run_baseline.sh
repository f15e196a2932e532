#!/usr/bin/env bash
# The baseline, which is what the settings are by default, on every GPU of this machine: bash scripts/run_baseline.sh
# Settings are environment variables, as always: ATTNGATE=elementwise LR=0.00468 SEED=2 bash scripts/run_baseline.sh
# Of the launcher: NPROC_PER_NODE (the GPUs that torch finds; 1 on a CPU), and all
# of run_8xh100.sh, which runs it. DRY_RUN=1 prints plan and command; without data it says what fetches them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)) && [ "${PRESET:-}" = "" ] && [ "${DEVICE:-auto}" != cpu ] && [ "${DRY_RUN:-0}" = 0 ]; then
    echo "run_baseline.sh: error: torch finds no GPU, and a CPU takes months for 2.7 billion tokens through" \
        "124 million parameters; PRESET=quickstart bash scripts/run_baseline.sh takes a minute, DEVICE=cpu begins" >&2
    exit 2
fi
[ "${DEVICE:-auto}" != cpu ] || gpus=0
export NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
export RUN_ID=${RUN_ID:-baseline-$(date -u +%Y%m%d-%H%M%S)-$$}

# The plan for so many processes, or a sentence on settings that cannot be.
plan=$(WORLD_SIZE=$NPROC_PER_NODE DRY_RUN=1 "$python" train_gpt.py)
if [ "${DRY_RUN:-0}" != 0 ]; then
    echo "$plan"
    echo "NPROC_PER_NODE=$NPROC_PER_NODE RUN_ID=$RUN_ID bash scripts/run_8xh100.sh"
elif grep -q '^tokens_on_disk:0$' <<< "$plan"; then
    exec "$python" train_gpt.py  # alone: it ends with one sentence
else
    exec bash scripts/run_8xh100.sh "$@"
fi
