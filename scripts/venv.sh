# Sourced by quickstart.sh and test.sh from the top of the tree: a virtual environment with requirements.txt in it.

# install_into_venv [package==version ...]: makes .venv where there is none; installs only when the list has changed.
install_into_venv() {
    local wanted python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "$python is older than Python 3.11; set PYTHON to a newer one" >&2; return 2; }
    wanted=$({ cat requirements.txt pyproject.toml; printf '%s\n' "$@"; } | cksum)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    if ! grep -qsxF "$wanted" .venv/installed; then
        echo "installing into .venv (a few minutes the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
        echo "$wanted" >> .venv/installed
    fi
}
