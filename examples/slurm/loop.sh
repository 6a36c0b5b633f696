#!/bin/bash
# One fit on a workstation, or wherever there is mpirun and no batch system: started again while it can go on, as after
# a rank that was killed. Ctrl-C, TERM or USR1 stop it in good order, to be started again with the same command.
#
#     RANKS=8 ./loop.sh            # nohup ./loop.sh > fit.log &   if you log out

export RUN=${RUN:-runs/fit}  # the program's: bridge.fit(..., run=os.environ["RUN"])
SCRIPT=${SCRIPT:-fit.py}
export BRIDGE_THREADS=${THREADS:-1} OMP_NUM_THREADS=${THREADS:-1}
. ./outcome.sh

# Several nodes by ssh: `-hosts a,b` (MPICH, Intel), `--host a:8,b:8` (Open MPI). Open MPI wants to be asked for more
# ranks than cores (--oversubscribe) and for root (--allow-run-as-root).
launch=(mpirun -n "${RANKS:-2}")

"${launch[@]}" python -m bridge doctor || { echo "bridge doctor: see above"; exit 2; }

verdict=again asked=
while [ "$verdict" = again ] && [ -z "$asked" ]; do
    run_begins "by hand"
    "${launch[@]}" python -m bridge run "$SCRIPT" & pid=$!
    await INT TERM USR1
    run_ended $code
done
exit "$code"
