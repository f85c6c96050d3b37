#!/usr/bin/env bash
# Sets up and runs the tests: ./run_tests.sh [pytest arguments]
#
#   ./run_tests.sh                       all of them, about 12 minutes on two cores
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
# A worker for each core, at most four, a file of tests at a time; the tiny models need no threads of their own.
export OMP_NUM_THREADS=1
exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
