#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; arguments go to pytest: bash scripts/test.sh -k gates
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_into_venv pytest==9.2.0
exec .venv/bin/python -m pytest -q "$@"
