#!/usr/bin/env bash
# Every method of the comparison, from ratings to a table: ./run_comparison.sh [--quick|--full] [options]
# Sets up a virtual environment, then runs what is missing; --help tells the options, configs/comparison.yaml the rows.
set -euo pipefail
project=$(dirname "$(realpath "$0")")
here=$PWD
cd "$project"
source ./set_up.sh
cd "$here" # paths on the command line count from there
PYTHONPATH=$project exec python -m cebs.comparison "$@"
