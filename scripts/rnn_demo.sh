#!/usr/bin/env bash
# A recurrent network learns a text by heart and writes: bash scripts/rnn_demo.sh ["some text"] [--help]
# Needs what quickstart.sh needs. Settings pass through: PRESET=rnn_medium bash ...; data/ and logs/ lie in the folder you are in.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
source scripts/venv.sh
install_into_venv
cd "$OLDPWD"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a model this small waits longer for a second thread than it computes
exec "$root/.venv/bin/python" "$root/scripts/rnn_demo.py" "$@"
