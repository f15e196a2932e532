#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; arguments go to pytest: bash scripts/test.sh -k gates
# Three processes take turns at the files, on two cores too, since some tests wait; -n 0 has one, in which -s and --pdb work.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_into_venv pytest==9.2.0 pytest-xdist==3.8.0 ruff==0.17.6 transformers==5.24.0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what is trained here is so small that a second thread waits more than it computes
exec .venv/bin/python -m pytest -q -n 3 --dist loadfile "$@"
