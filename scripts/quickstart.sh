#!/usr/bin/env bash
# From a fresh clone to a trained model: bash scripts/quickstart.sh
# Needs bash and Python 3.11+ with venv; the network only for pip. Settings pass through: NUM_ITERATIONS=20 bash ...
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_into_venv
.venv/bin/python scripts/prepare_data.py --source package:sympy --tokenizer bytes --out data/sympy
export PRESET=quickstart
export RUN_ID=${RUN_ID:-quickstart-$(date -u +%Y%m%d-%H%M%S)} LOG_DIR=${LOG_DIR:-logs}
.venv/bin/python train_gpt.py
[ -f "$LOG_DIR/$RUN_ID/model.safetensors" ] || exit 0 # it was stopped, and has said how to go on

echo
.venv/bin/python scripts/plot_runs.py --run "quickstart=$RUN_ID" --log-dir "$LOG_DIR" --title "Loss of $RUN_ID" --output "$LOG_DIR/$RUN_ID/curve.png"
.venv/bin/python - "$LOG_DIR/$RUN_ID.json" <<'PYTHON'
import json, math, sys
loss = json.load(open(sys.argv[1]))["final_loss"]
print(f"val_loss {loss:.4f} is in nats a byte: the model gives the byte that comes next a probability of {math.exp(-loss):.0%}, "
      f"in the geometric mean; 256 equally likely bytes would be {math.log(256):.2f}.")
PYTHON
echo "What it writes after \"def \":"
echo
.venv/bin/python scripts/sample.py "$RUN_ID" --log-dir "$LOG_DIR" --prompt "def " --echo --max-new-tokens 300
cat <<TEXT

Next, after \`source .venv/bin/activate\`:
  python scripts/sample.py $RUN_ID --interactive          # give it beginnings
  PRESET=quickstart ATTNGATE=elementwise python train_gpt.py                 # change one thing; torchrun for several GPUs
  DRY_RUN=1 python train_gpt.py                                              # the default run's plan
  python train_gpt.py --help                                                 # all that can be set
  python scripts/run_stage.py smoke                                          # variants and seeds, to a verdict
TEXT
