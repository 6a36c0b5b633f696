#!/bin/bash
# One fit on several nodes under PBS Pro (OpenPBS). Written from its documentation, not tried on such a cluster.
# Copy with outcome.sh beside your program; `qsub pbs.sh`.
#PBS -N fit
#PBS -l select=2:ncpus=16:mpiprocs=16
#PBS -l walltime=01:00:00
#PBS -j oe
#PBS -r n
# GPUs: `select=2:ncpus=16:mpiprocs=4:ngpus=4`; ranks of a node take turns.

cd "$PBS_O_WORKDIR" || exit 2
export RUN=${RUN:-runs/fit}  # the program's: bridge.fit(..., run=os.environ["RUN"])
SCRIPT=${SCRIPT:-fit.py}
CONTAINER=()  # (apptainer exec --bind "$PWD" bridge.sif)
export BRIDGE_THREADS=${THREADS:-1} OMP_NUM_THREADS=${THREADS:-1}
export TMPDIR=${TMPDIR:-/tmp}  # PBS gives each job one on the node's own disk
. ./outcome.sh

# An mpirun that was built for PBS knows the nodes; others take `-hostfile $PBS_NODEFILE` (Open MPI) or `-f` (MPICH).
launch=(mpirun -n "$(wc -l <"$PBS_NODEFILE")" "${CONTAINER[@]}")

"${launch[@]}" python -m bridge doctor || { echo "bridge doctor: see above"; exit 2; }

run_begins "PBS job $PBS_JOBID"
# PBS sends no warning: `timeout` does, five minutes before the walltime, to mpirun, which tells the ranks.
timeout --foreground --preserve-status --signal=USR1 "${STOP_AFTER:-55m}" \
    "${launch[@]}" python -m bridge run "$SCRIPT"
run_ended $?
# `qrerun` is for operators; a new job that begins when this one has ended is for everybody.
[ "$verdict" = again ] && qsub -W depend=afterany:"$PBS_JOBID" -v RUN="$RUN",SCRIPT="$SCRIPT" "${JOB_SCRIPT:-pbs.sh}"
exit "$code"
