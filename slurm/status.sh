#!/usr/bin/env bash
# Tells how a submitted comparison stands, and which command comes next: slurm/status.sh [its folder; default: the last]
source "$(dirname "$(realpath "$0")")/login.sh"
exec python -m cebs.slurm status "$@"
