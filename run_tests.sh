#!/usr/bin/env bash
# Sets up and runs the tests: ./run_tests.sh [pytest arguments]
#
#   ./run_tests.sh                       all of them, about 5 minutes on two cores
#   ./run_tests.sh tests/test_metrics.py -k ndcg
#
# RESOLVE=1 ./run_tests.sh tests/test_supply.py checks that a fresh environment resolves to the pins.
#
# What needs the real model, Goodreads in ../shared or the network runs where these are there, and says when it is skipped.
set -euo pipefail
cd "$(dirname "$0")"
source ./set_up.sh
ruff check .
ruff format --check .
# A file of tests at a time for each worker. Many tests wait, for Slurm or for a process to die: one worker more than cores.
cores=$(env -u OMP_NUM_THREADS nproc)
exec python -m pytest --numprocesses $((cores < 4 ? cores + 1 : 4)) --dist loadfile --no-loadscope-reorder "$@"
