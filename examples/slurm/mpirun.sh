#!/bin/bash
# One fit on several nodes of a Slurm cluster, started by mpirun. Copy with outcome.sh beside your program; `sbatch mpirun.sh`.
#SBATCH --job-name=fit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=16
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# B: the signal comes to this script, three minutes before the end, and `await` hands it on to mpirun, which tells the
# ranks. GPUs: `#SBATCH --gpus-per-node=4`; ranks of a node take turns.

export RUN=${RUN:-runs/fit}  # the program's: bridge.fit(..., run=os.environ["RUN"])
SCRIPT=${SCRIPT:-fit.py}
CONTAINER=()  # (apptainer exec --bind "$PWD" bridge.sif)
export BRIDGE_THREADS=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export TMPDIR=${SLURM_TMPDIR:-/tmp}  # on the node's own disk
. ./outcome.sh

# The mpirun of the MPI that mpi4py was built for, made with Slurm support: it then knows the nodes. Ranks with several
# threads must not be pinned to one core: `--map-by slot:PE=$BRIDGE_THREADS` (Open MPI), `-bind-to none` (MPICH).
launch=(mpirun -n "$SLURM_NTASKS" "${CONTAINER[@]}")

"${launch[@]}" python -m bridge doctor || { echo "bridge doctor: see above"; exit 2; }

run_begins "Slurm job $SLURM_JOB_ID"
"${launch[@]}" python -m bridge run "$SCRIPT" & pid=$!
await
run_ended $code
[ "$verdict" = again ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
