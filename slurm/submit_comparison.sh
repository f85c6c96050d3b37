#!/usr/bin/env bash
# Submits the comparison as Slurm jobs: slurm/submit_comparison.sh [the options of run_comparison.sh]
# --dry_run prints the jobs and submits none; started again, it submits what is missing; slurm/status.sh tells how it stands.
source "$(dirname "$(realpath "$0")")/login.sh"
exec python -m cebs.slurm submit "$@"
