#!/usr/bin/env bash
# The main job, from ratings to a table of five rows: ./run_pipeline.sh [--quick|--full] [options]
#
#   prepare_data -> SFT -> cluster/exposure negatives -> DPO on hard, DPO on long-tail, S-DPO on both
#                -> predictions of the base model, the SFT model and the three aligned ones -> evaluation -> CSV
#
# It is the comparison with these rows only; --help tells the options.
exec "$(dirname "$(realpath "$0")")/run_comparison.sh" --main_job "$@"
