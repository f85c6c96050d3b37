# Sourced by run_comparison.sh, run_tests.sh and slurm/login.sh: makes the virtual environment, once, and again when the
# pins change. VENV names another place for it, PYTHON another interpreter.

VENV=${VENV:-.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}

pins=$(cat requirements.txt constraints.txt | cksum)
if [[ ! -f $VENV/installed || $(cat "$VENV/installed") != "$pins" ]]; then
  if ! "${PYTHON:-false}" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    echo "Python 3.11 is needed and was not found; install it, or name it: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
  fi
  echo "== set-up: $VENV with the packages of requirements.txt (some minutes, once)"
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --requirement requirements.txt
  echo "$pins" > "$VENV/installed"
fi
export PATH="$VENV/bin:$PATH"
