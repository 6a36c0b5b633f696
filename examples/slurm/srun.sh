#!/bin/bash
# One fit on several nodes of a Slurm cluster, started by srun. Copy with outcome.sh beside your program; `sbatch srun.sh`.
#SBATCH --job-name=fit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=16
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
# The last three: one log for all starts; the job may start again; and three minutes before the end all tasks are told
# to stop. Let that be longer than one evaluation. GPUs: `#SBATCH --gpus-per-task=1`; each rank then sees its own.

export RUN=${RUN:-runs/fit}  # the program's: bridge.fit(..., run=os.environ["RUN"])
SCRIPT=${SCRIPT:-fit.py}
CONTAINER=()  # (apptainer exec --bind "$PWD" bridge.sif)
export BRIDGE_THREADS=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export TMPDIR=${SLURM_TMPDIR:-/tmp}  # on the node's own disk: runs of external programs, outputs beyond rank_mb
. ./outcome.sh

# How srun and MPI find each other: pmix for Open MPI, pmi2 for MPICH and Intel (`srun --mpi=list`). If one rank is
# killed, so is the step. srun does not take --cpus-per-task from sbatch (22.05 and later).
launch=(srun --mpi="${MPI_TYPE:-pmix}" --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${CONTAINER[@]}")

"${launch[@]}" python -m bridge doctor || { echo "bridge doctor: see above"; exit 2; }

run_begins "Slurm job $SLURM_JOB_ID"
"${launch[@]}" python -m bridge run "$SCRIPT"
run_ended $?
[ "$verdict" = again ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
