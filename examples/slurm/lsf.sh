#!/bin/bash
# One fit on several nodes under LSF. Written from its documentation, not tried on such a cluster.
# Copy with outcome.sh beside your program; `bsub < lsf.sh`.
#BSUB -J fit
#BSUB -n 32
#BSUB -R "span[ptile=16]"
#BSUB -W 1:00
#BSUB -o fit.%J.out
#BSUB -r
#BSUB -Q "75"
#BSUB -wa USR1
#BSUB -wt 5
# The last four: start again if a host fails, and where the exit code is 75; and five minutes before the end the job is
# told to stop. GPUs: `#BSUB -gpu "num=4"`; ranks of a node take turns.

export RUN=${RUN:-runs/fit}  # the program's: bridge.fit(..., run=os.environ["RUN"])
SCRIPT=${SCRIPT:-fit.py}
CONTAINER=()  # (apptainer exec --bind "$PWD" bridge.sif)
export BRIDGE_THREADS=${THREADS:-1} OMP_NUM_THREADS=${THREADS:-1}
export TMPDIR=${TMPDIR:-/tmp}  # on the node's own disk
. ./outcome.sh

# An mpirun that was built for LSF knows the hosts.
launch=(mpirun -n "$LSB_DJOB_NUMPROC" "${CONTAINER[@]}")

"${launch[@]}" python -m bridge doctor || { echo "bridge doctor: see above"; exit 2; }

run_begins "LSF job $LSB_JOBID"
"${launch[@]}" python -m bridge run "$SCRIPT" & pid=$!
await
run_ended $code
# LSF starts a job again that ends with 75, and would for ever: not when `run_ended` has had enough.
[ "$verdict" = failed ] && [ "$code" = 75 ] && code=1
exit "$code"
