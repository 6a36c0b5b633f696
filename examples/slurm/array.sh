#!/bin/bash
# Many independent fits on a Slurm cluster, one process each, at most 20 at a time: `sbatch array.sh`. Better than one
# large job where each fit keeps one core busy by itself. Copy with outcome.sh beside your program.
#SBATCH --job-name=fits
#SBATCH --array=0-99%20
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180

# Each fit has a directory of its own; the program takes its start, seed or target from the number.
export RUN=${RUN:-runs/fit}-$SLURM_ARRAY_TASK_ID
SCRIPT=${SCRIPT:-fit.py}
export BRIDGE_THREADS=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export TMPDIR=${SLURM_TMPDIR:-/tmp}  # on the node's own disk
. ./outcome.sh

# srun, so that the signal reaches the program; --mpi=none, because there is only one process.
launch=(srun --mpi=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")

"${launch[@]}" python -m bridge doctor || { echo "bridge doctor: see above"; exit 2; }

run_begins "Slurm job $SLURM_ARRAY_JOB_ID, task $SLURM_ARRAY_TASK_ID"
"${launch[@]}" python -m bridge run "$SCRIPT" "$SLURM_ARRAY_TASK_ID"
run_ended $?
# A task of an array has a job number of its own; only this one comes again.
[ "$verdict" = again ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
