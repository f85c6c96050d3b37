# Sourced by every slurm/*.sbatch: the environment of a job, and `run`, which starts the job's script.
#
#   run srun [options] python <script>.py [flags]
#
# Before the time limit (--signal) Slurm sends SIGUSR1 to this shell, which passes it on to the script. The script saves
# and ends with exit code 130, the job goes back into the queue, and there the same command goes on.
#
# In a job array, %a in a flag stands for the task's number:
#   sbatch --array=0-2 slurm/sft_smol.sbatch --seed %a --output_dir output/sft_%a
# Decoding in eight parts, and one more job, without a GPU, that puts them together when all are done:
#   parts=$(sbatch --parsable --array=1-8 slurm/generate_predict_batch.sbatch --shard %a/8)
#   sbatch --dependency=afterok:$parts --gpus-per-node=0 slurm/generate_predict_batch.sbatch
#
# CEBS_NOTE, set by slurm/submit_comparison.sh, is where a finished stage leaves the note that says so.

max_restarts=100 # a job whose time limit leaves it no time to work would go round for ever

step= notices=0
trap 'notices=$((notices + 1)); [[ -z $step ]] || kill -USR1 "$step"' USR1

[[ ! -f slurm/site.env ]] || source slurm/site.env
VENV=${VENV:-.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
if [[ ! -x $VENV/bin/python ]]; then
  echo "$VENV: no Python environment there; slurm/submit_comparison.sh --dry_run on the login node makes it" >&2
  exit 2
fi
export PATH="$VENV/bin:$PATH"

export HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 # compute nodes have no network: what is missing is said at once
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# For jobs of several tasks, see slurm/rank.sh. One that dies takes the others along, in place of a hang.
export SLURM_KILL_BAD_EXIT=1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

run() {
  local status heard
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
  echo "== job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date +%FT%T): $*"
  SECONDS=0
  "$@" &
  step=$!
  while true; do # a notice ends a wait before the script has ended; a second one finds the exit code even after the end
    heard=$notices
    wait "$step"
    status=$?
    ((notices > heard)) || break
  done

  if ((status == 0)); then
    leave_note "$@" || return
    echo "== done after $SECONDS s"
  elif ((notices > 0 && ${SLURM_RESTART_COUNT:-0} < max_restarts)); then
    echo "== interrupted after $SECONDS s, back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # which does not return: requeueing ends this shell
    echo "== interrupted after $SECONDS s, and not requeued; submitted again, it goes on from there"
  else
    echo "== failed with exit code $status after $SECONDS s"
  fi
  return "$status"
}

# The command line from "python" on, as cebs.comparison writes and reads it
leave_note() {
  [[ -n ${CEBS_NOTE:-} ]] || return 0
  while [[ $1 != python ]]; do shift; done
  python -c 'import shlex, sys; print(shlex.join(sys.argv[1:]), end="")' "$@" >"$CEBS_NOTE.tmp" &&
    mv "$CEBS_NOTE.tmp" "$CEBS_NOTE"
}
