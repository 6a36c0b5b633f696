# What became of a start of a run: for the job scripts beside this file, which source it (bash).
#
#   run_begins        before the launcher; counts the start in $RUN/starts
#   run_ended CODE    after it; sets `verdict` to done, again or failed, `code` to the exit code, and says why
#
# The launcher's exit code alone does not tell: Open MPI makes 1 of a SIGTERM, and a rank that was killed is 137, 9 or
# 255. $RUN/status.json, which the run writes itself, does. Exit codes of bridge: 0 done, 1 uncaught error, 2 input or
# set-up, 3 failed evaluations, 70 a bug, 75 stopped and can be resumed.

MAX_STARTS=${MAX_STARTS:-20}  # a broken job must not come back for ever; remove $RUN/starts to count anew

_status() {  # "state exit_code step time pid", or nothing where there is no status yet
    python -c 'import json, sys
print(*(json.load(open(sys.argv[1])).get(k) for k in ("state", "exit_code", "step", "time", "pid")))' \
        "$RUN/status.json" 2>/dev/null
}

run_begins() {
    mkdir -p "$RUN" && echo "$(date +%FT%T) $(hostname) $*" >>"$RUN/starts" || exit 2
    _before=$(_status)
}

run_ended() {
    local now state said step step_before
    code=$1 now=$(_status)
    # A status that has not changed is of an earlier start: this one never got as far as the run.
    [ "$now" = "$_before" ] && now="none"
    read -r state said step _ <<<"$now"
    read -r _ _ step_before _ <<<"$_before"
    if [ "$state" = stopped ] && [ "$said" = 75 ] || [ "$code" = 75 ]; then
        verdict=again code=75
    elif [ "$state" = running ] && [ "${step:-0}" -gt "${step_before:-0}" ]; then
        # Killed without a last word (a node, the memory), but it had got further than the start before.
        verdict=again code=75
    elif [ "$code" = 0 ] && [ "$state" != running ]; then
        verdict=done
    else
        verdict=failed
        [ "$state" = failed ] && code=$said
        [ "$code" = 0 ] && code=1
    fi
    local starts
    starts=$(wc -l <"$RUN/starts")
    if [ "$verdict" = again ] && [ "$starts" -ge "$MAX_STARTS" ]; then
        echo "$RUN: started $starts times, which is the limit (MAX_STARTS); not again"
        verdict=failed
    fi
    echo "$RUN: $verdict (exit code $code; the launcher said $1; state $state, step ${step:-unknown})"
    [ "$verdict" = done ] || cat "$RUN/status.json" 2>/dev/null
    return 0
}

# await [SIGNAL...]: for a launcher in the background, `mpirun ... & pid=$!`. Hands the signals (USR1) on to it as USR1,
# waits for its end, and sets `code`, and `asked` if there was a signal.
await() {
    local again=1
    asked=
    trap 'asked=1 again=1; kill -USR1 "$pid" 2>/dev/null' "${@:-USR1}"
    while [ -n "$again" ]; do  # a trap interrupts `wait`
        again=
        wait "$pid"
        code=$?
    done
    trap - "${@:-USR1}"
}
