#!/usr/bin/env bash
# srun slurm/rank.sh python <script>.py [flags]: makes the tasks of a job the ranks of one torch.distributed run.
# With one task, the default, there is nothing to do. Several: sbatch --ntasks-per-node=4 --gpus-per-node=4 slurm/...
if ((SLURM_NTASKS > 1)); then
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
fi
exec "$@"
