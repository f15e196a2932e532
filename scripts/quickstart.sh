#!/usr/bin/env bash
# From a fresh clone to a trained model: bash scripts/quickstart.sh
# Needs bash and Python 3.11+ with venv; the network only for pip. Settings pass through: NUM_ITERATIONS=20 bash ...
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_into_venv
.venv/bin/python scripts/prepare_data.py --source package:sympy --tokenizer bytes --out data/sympy
export PRESET=quickstart
.venv/bin/torchrun --standalone --nproc_per_node=1 train_gpt.py
cat <<'TEXT'

Next, after `source .venv/bin/activate`:
  PRESET=quickstart ATTNGATE=elementwise torchrun --standalone --nproc_per_node=1 train_gpt.py   # change one thing
  DRY_RUN=1 python train_gpt.py                                                                  # the default run's plan
  python train_gpt.py --help                                                                     # all that can be set
  python scripts/run_stage.py smoke                                                              # variants and seeds, to a verdict
TEXT
