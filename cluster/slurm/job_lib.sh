#!/bin/bash
# The values are set by the script that sources this file, which also uses `task` and `tasks`; "$@" of a
# task is expanded by the shell around it:
# shellcheck disable=SC2016,SC2034,SC2154

# The decisions of a Slurm batch script: whether a job may start, what happens at a signal, and what
# follows when its ranks have ended. `lmscale submit` copies this file to RUN/jobs/K.lib.sh, where the
# job's script (cluster/slurm/job.sh, or a site's own template) sources it. It needs bash, coreutils and
# Slurm's commands; Python is not needed.
#
# The script starts the ranks with one srun and ends with its exit code. Codes that another start may
# cure (75 retry, 85 saved on request, 1, 128 + a signal) lead to another start: in the same job by
# `scontrol requeue`, or in a follow-up job where requeue is off, refused or impossible. There is none
# after scancel, none while RUN/stop exists, and at most max_restarts without a newer checkpoint.
# The decision is written to RUN/jobs/K.end: one JSON object (see record_end).

# The script names the version of this interface that it was written for: its values and calls.
job_lib_version=1

say() { printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*" >&2; }

# Slurm's TERM goes to all processes of this script; a query that is under way must not be ended by it.
ask() { timeout -s KILL 60 bash -c 'trap "" TERM; exec "$@"' ask "$@"; }

record_end() {  # CODE SENTENCE [AGAIN]: write RUN/jobs/K.end, which `status` reads; whole or not at all
    local again=${3:-false} text=${2//\\/\\\\} name=${LMSCALE_START:-}
    text=${text//\"/\\\"}
    text=${text//[[:cntrl:]]/ }
    if ! printf '{"version": 1, "job": "%s", "start": "%s", "code": %d, "reason": "%s", "again": %s, "time": %(%s)T}\n' \
        "$SLURM_JOB_ID" "$name" "$1" "$text" "$again" -1 >"$ended.tmp" || ! mv -f "$ended.tmp" "$ended"; then
        say "cannot write $ended"
    fi
}

finish() {  # CODE SENTENCE: end with this code; nothing follows
    [ -z "$next" ] || drop "$next"
    record_end "$1" "$2"
    exit "$1"
}

job_state() {  # how Slurm sees this job now; empty if it does not answer
    local answer
    trap '' TERM
    answer=$(SLURM_TIME_FORMAT=standard ask scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || return
    answer=" ${answer#* UserId=} "  # behind the job's name, which may be any text
    if [[ $answer =~ \ Restarts=([0-9]+)\  ]] && [ "${BASH_REMATCH[1]}" -gt "$restarts" ]; then
        echo requeued  # by Slurm itself or by an administrator
        return
    fi
    # While a job ends its state is COMPLETING whatever ended it (22.05), so other fields decide.
    case $answer in
        *" Reason=TimeLimit "* | *" JobState=TIMEOUT "*) echo "at its time limit" ;;
        *" Reason=NodeDown "* | *" JobState=NODE_FAIL "*) echo "without one of its nodes" ;;
        *" JobState=PREEMPTED "* | *" JobState=COMPLETING "*" PreemptTime="[0-9]*) echo preempted ;;
        *" JobState=CANCELLED "* | *" JobState=COMPLETING "*) echo cancelled ;;
        *) echo running ;;
    esac
}

is_node() { [[ $1 =~ ^[A-Za-z0-9._-]+$ ]] && ask scontrol show node "$1" >/dev/null 2>&1; }

bad_nodes() {  # names in RUN/bad-nodes as Slurm knows them, with commas
    local path name names='' LC_ALL=C  # in the order that submit names them in
    trap '' TERM
    for path in "$run"/bad-nodes/*; do
        [ -e "$path" ] || continue
        name=${path##*/}
        if is_node "$name"; then
            names=$names,$name
        elif is_node "${name%%.*}"; then  # its host name has a domain
            names=$names,${name%%.*}
        else
            say "cannot exclude $path: Slurm has no node of that name"
        fi
    done
    echo "${names#,}"
}

outside() (  # a command without this job's own variables, which would change what sbatch submits
    trap '' TERM
    for name in $(compgen -e); do
        case $name in
            SLURM_CONF) ;;
            SLURM_* | SLURMD_* | SBATCH_* | SRUN_* | SALLOC_* | PMI_* | PMIX_* | OMPI_* | PRTE_* | HYDRA_* | HYDI_* | \
                MPI_LOCAL* | LMSCALE_* | MASTER_* | LOCAL_* | RANK | WORLD_SIZE | TORCHELASTIC_*) unset "$name" ;;
        esac
    done
    ask "$@"
)

follow_up() {  # a job that starts when this one has ended, without these bad nodes
    local bad=$1 output file=$script before=$next options=()
    [ -n "$next" ] && [ "$bad" = "$next_avoided" ] && return 0
    [ -f "$file" ] || file=$0  # Slurm's own copy
    [ -n "$bad" ] && options=("--exclude=${excluded:+$excluded,}$bad")
    options+=(--parsable "--dependency=afterany:$SLURM_JOB_ID" --kill-on-invalid-dep=yes)
    if output=$(outside sbatch "${options[@]}" "$file" "$SLURM_JOB_ID" "$bad" 2>&1); then
        output=${output##*$'\n'}
        next=${output%%;*}
    else
        say "no follow-up job: $output"
        next=$(queued "$before")
        if [ -z "$next" ]; then
            next=$before
            return 1
        fi
        say "but job $next was queued"
    fi
    next_avoided=$bad
    echo "$next" >>"$chain" || say "cannot write $chain: status and stop will not find job $next"
    say "job $next follows${bad:+, without $bad}"
    [ -z "$before" ] || drop "$before"
}

queued() {  # ID: another follow-up than this one: a busy controller may accept a job and lose its answer
    local id depends name other=
    trap '' TERM
    while read -r id depends name; do
        [[ $depends =~ ^afterany:$SLURM_JOB_ID([^0-9]|$) ]] || continue
        [ "$id" = "$1" ] || [ "$name" != "${SLURM_JOB_NAME:-}" ] || other=$id
    done < <(ask squeue -h -t PENDING -u "$(id -un)" -o '%i %E %j' 2>/dev/null)
    echo "$other"
}

drop() {  # ID: take a follow-up that has not started yet out of the queue
    [ "$1" = "$next" ] && next=
    # scancel fails for a job that has just been cancelled, e.g. by `lmscale stop --now`.
    if ! ask scancel --quiet --state=PENDING "$1" && ! gone "$1"; then
        say "cannot cancel job $1, which was to follow"
    fi
    forget "$1"
}

gone() {
    local left
    left=$(ask squeue -h -t PENDING -j "$1" -o %i 2>/dev/null) && [ -z "$left" ]
}

forget() {  # ID: remove a job from the chain
    local id kept=
    [ -f "$chain" ] || return
    while read -r id; do
        [ "$id" = "$1" ] || kept+=$id$'\n'
    done <"$chain"
    printf %s "$kept" >"$chain.tmp" && mv -f "$chain.tmp" "$chain"
}

newest_checkpoint() {
    local path newest=
    for path in "$run"/checkpoints/step-*-a*; do
        [ -d "$path" ] && [[ $path != *.tmp ]] && newest=${path##*/}
    done
    echo "$newest"
}

count_start() {  # bound the starts of a run that fails again and again
    local failed=0 before='' newest
    newest=$(newest_checkpoint)
    if [ -n "${LMSCALE_FRESH:-}" ] || [ ! -f "$tries" ]; then
        failed=0
    else
        read -r failed before <"$tries"
        if [ "$newest" = "$before" ] && [[ $failed =~ ^[0-9]+$ ]]; then failed=$((failed + 1)); else failed=0; fi
    fi
    if ! echo "$failed $newest" >"$tries"; then
        say "cannot write $tries, so starts cannot be counted: not started"
        finish 75 "not started: $tries cannot be written, so starts cannot be counted"
    fi
    [ "$failed" -le "$max_restarts" ] && return
    say "not started again: $max_restarts restarts without a newer checkpoint (cluster.max_restarts)"
    echo "$max_restarts restarts without a newer checkpoint; then job $SLURM_JOB_ID" >"$run/stop"
    finish 75 "not started again: $max_restarts restarts without a newer checkpoint (cluster.max_restarts)"
}

# Always USR2: srun passes it on, while for TERM it kills the tasks at once, before they can save.
save() { kill -s USR2 "$step" 2>/dev/null; }

on_term() {  # from scancel, at the time limit, for preemption, or because of a dead node
    if [ -z "$step" ]; then  # not begun, or over: the next step checks $asked
        asked=143
        return
    fi
    save
    again=yes
    [ -z "$busy" ] || return  # the call that is under way checks once more: two would queue two jobs
    busy=yes
    local why
    for _ in {1..5}; do
        again=
        why=$(job_state)
        case $why in
            at* | without* | preempted)  # KILL comes soon (KillWait), so what follows is arranged now
                say "$why: ending"
                [ -e "$run/stop" ] || follow_up "$(bad_nodes)" || why= ;;
            cancelled) [ -z "$next" ] || drop "$next" ;;
        esac
        [ -n "$why" ] && [ -z "$again" ] && break
        rest 1
    done
    busy=
}

on_signal() {
    say "$signal: saving"
    if [ -n "$step" ]; then save; else asked=85; fi
}

rest() {  # a signal ends it early
    sleep "$1" &
    wait $!
}

go_on() {  # another start, where that is right
    local why bad pause=1
    for _ in {1..60}; do
        why=$(job_state)
        [ -e "$run/stop" ] && finish "$code" "not started again: $run/stop exists"
        case $why in
            requeued)
                record_end "$code" "Slurm has put the job back into the queue" true
                return ;;
            cancelled)
                say "cancelled: not started again"
                finish "$code" "the job was cancelled: not started again" ;;
            "")  # the controller does not answer; a follow-up checks itself how this job has ended
                if [ -n "$next" ]; then
                    record_end "$code" "job $next follows" true
                    return
                fi
                say "Slurm does not answer: trying again" ;;
            *)
                bad=$(bad_nodes)
                # A controller that died just after it had taken a job may have forgotten it.
                if [ -n "$next" ] && ! ask scontrol show job "$next" >/dev/null 2>&1; then
                    forget "$next"
                    next=
                fi
                [ "$why" = running ] && [ "$bad" = "$avoided" ] && put_back && return
                if follow_up "$bad"; then
                    record_end "$code" "job $next follows${bad:+, without $bad}" true
                    return
                fi ;;
        esac
        rest $pause
        pause=10
    done
    say "not started again: Slurm accepted neither a requeue nor a follow-up job; use lmscale resume"
    record_end "$code" "not started again: Slurm accepted neither a requeue nor a follow-up job"
}

put_back() {  # this job into the queue; it keeps its options, so another node to leave out needs a follow-up
    [ "$requeue" = yes ] || return
    # Slurm ends this script as soon as it has put the job back, so the decision is written first.
    record_end "$code" "the job was put back into the queue" true
    if ask scontrol requeue "$SLURM_JOB_ID" || [ "$(job_state)" = requeued ]; then
        [ -z "$next" ] || drop "$next"
        return 0
    fi
    say "Slurm does not requeue this job"
    return 1
}

decisive_code() {  # srun ends with the highest code of all tasks, which in rank mode may hide the cause
    local all wanted
    [ -f "$codes" ] || return
    all=" $(tr '\n' ' ' <"$codes")"
    rm -f "$codes"
    for wanted in 87 78 65 86 2 1 75 85; do
        if [[ $all == *" $wanted "* ]]; then
            code=$wanted
            return
        fi
    done
}

end() {  # with the code of a start; where another one may cure it, that is arranged first
    code=$1
    if [ -e "$run/stop" ]; then
        [ "$code" = 85 ] && code=0
        finish "$code" "ended with $1, and $run/stop exists: not started again"
    fi
    case $code in
        75 | 85 | 1) go_on ;;
        *)
            # Above 128 + 64 there is no signal: srun ends with 255 for an option that it does not support.
            if [ "$code" -le 128 ] || [ "$code" -gt 192 ]; then
                finish "$code" "ended with $code: no other start can cure that"
            fi
            go_on ;;
    esac
    exit "$code"
}

unprepared() {  # CODE COMMAND: a command of the site's own part has failed
    say "this failed with $1: $2"
    [ -n "$asked" ] || [ "$1" -gt 128 ] || finish 78 "a command of the site failed with $1: $2"
    end "${asked:-$1}"  # a signal to all processes of this job has ended it, not a fault of its own
}

# ---- the steps of a job, called by its script ------------------------------------------------------

job_begin() {  # VERSION [FOLLOWED_JOB [BAD_NODES]]: whether this job may start; ends the script otherwise
    asked=${asked:-}               # set by the traps of the script: a signal came before the ranks are started
    if [ "$1" != "$job_lib_version" ]; then
        say "the script was written for version $1 of its library, which has $job_lib_version; submit again"
        exit 78
    fi
    follows=${2:-}                 # the job that this one follows; empty: submitted by a person
    avoided=${3:-}                 # bad nodes that this job was submitted without
    restarts=${SLURM_RESTART_COUNT:-0}
    chain=$run/jobs/$number.chain  # ids of the follow-up jobs, one per line
    tries=$run/jobs/$number.tries  # starts since the newest checkpoint changed, and its name
    ended=$run/jobs/$number.end    # the decision of the newest start
    next=                          # the follow-up job that waits for the end of this one
    next_avoided=
    step=                          # pid of srun, while it runs
    busy=                          # set while on_term runs
    again=                         # set by a TERM that comes meanwhile
    local answer recorded by_hand='' id
    export LMSCALE_START=slurm-$SLURM_JOB_ID-$restarts
    codes=$run/jobs/$number.codes-$LMSCALE_START
    rm -f "$run/jobs/$number.codes"-*
    unset LMSCALE_FRESH LMSCALE_DEADLINE RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    if [ -z "$follows" ] && [ "$restarts" = 0 ]; then
        export LMSCALE_FRESH=1  # submitted by a person: restarts are counted from zero
    fi
    say "$LMSCALE_START on $SLURM_JOB_NUM_NODES node(s): $SLURM_JOB_NODELIST"
    if [ -n "$follows" ]; then
        answer=$(ask scontrol --oneliner show job "$follows" 2>/dev/null)
        case " ${answer#* UserId=} " in
            *" JobState=CANCELLED "* | *" JobState=PENDING "* | *" JobState=RUNNING "*)
                say "job $follows was cancelled or continues itself: nothing to do"
                forget "$SLURM_JOB_ID"
                exit 0 ;;
        esac
    fi
    rm -f "$ended"
    recorded=$run/jobs/$number.json
    if [ -f "$recorded" ] && [ -n "${LMSCALE_FRESH:-}" ] && ! grep -q "\"job\": \"$SLURM_JOB_ID\"" "$recorded"; then
        by_hand=$SLURM_JOB_ID  # by sbatch of the script: status and stop must find it
    fi
    if [ -f "$chain" ]; then  # left by an earlier start of this job
        while read -r id; do
            [ "$id" = "$SLURM_JOB_ID" ] && next= || next=$id
        done <"$chain"
        [ -z "$next" ] || drop "$next"
    fi
    [ -z "$by_hand" ] || echo "$by_hand" >>"$chain" || say "cannot write $chain: status will not find this job"
    if [ -e "$run/stop" ]; then
        say "stopped by $run/stop; use lmscale resume"
        record_end 0 "not started: $run/stop exists"
        exit 0
    fi
    count_start
    [ "$requeue" = no ] && follow_up "$(bad_nodes)"  # now: the node of this script may lose power later
}

job_environment() {  # variables of the tasks; sets `tasks` per node and `task`, the shell around each command
    local hosts first port ends
    hosts=$(ask scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) || hosts=$SLURMD_NODENAME
    first=${hosts%%$'\n'*}
    port=$((20000 + SLURM_JOB_ID % 10000))  # below those that Linux gives to outgoing connections
    export PYTHONUNBUFFERED=1
    ends=${SLURM_JOB_END_TIME:-}  # not set by 22.05
    [ -n "$ends" ] || ends=$(SLURM_TIME_FORMAT=standard ask squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null)
    [[ $ends =~ ^[0-9]*$ ]] || ends=$(date -d "$ends" +%s 2>/dev/null) || ends=
    if [ -z "$ends" ] && [ -n "$time_limit" ]; then
        ends=$(($(date +%s) - SECONDS + time_limit))
    fi
    [ -n "$ends" ] && export LMSCALE_DEADLINE=$((ends - signal_lead))

    if [ "$launch" = node ]; then
        tasks=1
        export LMSCALE_NODES=$SLURM_JOB_NUM_NODES LMSCALE_MASTER=$first:$port
        task=(sh -c 'export LMSCALE_NODE_RANK="$SLURM_NODEID"; exec "$@"' lmscale)
    else
        tasks=$ranks_per_node
        export MASTER_ADDR=$first MASTER_PORT=$port
        # A shell around each rank writes down a bad exit code, which the end of the other ranks would hide.
        task=(sh -c 'trap : TERM INT USR1 USR2; "$@"; code=$?; [ $code = 0 ] || echo $code >>"$0"; exit $code' "$codes")
    fi
}

job_ready() {  # traps for the time that the ranks run; ends the script if a signal came before
    trap on_term TERM
    [ "$signal" = TERM ] || trap on_signal "$signal"
    if [ "$asked" = 85 ] && [ "$launch" = node ] && [ "${LMSCALE_DEADLINE:-0}" -gt "$(date +%s)" ]; then
        asked=  # Slurm may be a minute early, and supervisors observe the deadline themselves
    fi
    if [ -n "$asked" ]; then
        say "signalled before the ranks were started"
        end "$asked"
    fi
}

job_wait() {  # PID: wait for srun, then decide what follows
    step=$1
    [ -z "$asked" ] || save  # it came in between
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal that is trapped interrupts wait
    wait "$step"
    code=$?
    step=
    decisive_code
    say "$LMSCALE_START has ended with $code"
    end "$code"
}
