#!/usr/bin/env bash
# Submits the main job, the five rows of run_pipeline.sh: slurm/submit_pipeline.sh [options]
exec "$(dirname "$(realpath "$0")")/submit_comparison.sh" --main_job "$@"
