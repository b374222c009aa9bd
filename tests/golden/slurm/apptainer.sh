#!/bin/bash
#SBATCH --job-name=seven
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:2
#SBATCH --signal=B:USR2@180
#SBATCH --requeue
#SBATCH --chdir=/home/me/work
#SBATCH --output=/shared/runs/seven/logs/job-1.log
#SBATCH --open-mode=append

# One submission of a run, as `lmscale submit` queues it; `sbatch` of this file by hand does the same.
# It runs on the first node of the job and needs bash, coreutils and Slurm's commands there, no Python.
#
# It starts the ranks with one srun and ends with its exit code. Codes that another start may cure (75 retry,
# 85 saved on request, 1, 128 + a signal) lead to another start: in the same job by `scontrol requeue`, or in
# a follow-up job where requeue is off, refused or impossible. Never after scancel, never while RUN/stop
# exists, and at most max_restarts times without a newer checkpoint.
#
# A site copies cluster/slurm/job.sh, edits it and names its copy in cluster.slurm.template. @ and a name in
# braces stand for a value of the run, quoted for the shell; each of them must stay exactly where a value is.

# A value may hold $ and commas, a profile of the site may be elsewhere, and "$@" of a task is for the task:
# shellcheck disable=SC2016,SC2054,SC1091

run=/shared/runs/seven
# Which submission of the run this is, and this file: follow-up jobs are made from it.
number=1
script=/shared/runs/seven/jobs/1.sh
# node: srun starts one supervisor a node; rank: it starts the ranks.
launch=node
ranks_per_node=2
# yes: go on in the same job; no: in follow-up jobs.
requeue=yes
# Nodes that the run file excludes.
excluded=''
# What Slurm sends to this script so many seconds before the time limit (in seconds, if the run file has one).
signal=USR2
signal_lead=180
time_limit=
max_restarts=0
srun_options=(
    --export=ALL
    --kill-on-bad-exit=0
)
command=(
    apptainer
    exec
    --nv
    --bind
    /data/corpus/train:/data/corpus/train
    --bind
    /home/me/work:/home/me/work
    --bind
    /local/cache:/local/cache
    --bind
    /shared/runs/seven:/shared/runs/seven
    --pwd
    /home/me/work
    /images/l.sif
    /opt/bin/python
    -P
    -m
    lmscale
    train
    /shared/runs/seven/jobs/1.yaml
    --nproc
    2
)

set -u
asked=                         # code to go on with where a signal comes before the ranks are started
trap 'asked=143' TERM          # untrapped, either would end this script, and nothing would follow
[ "$signal" = TERM ] || trap 'asked=85' "$signal"
follows=${1:-}                 # the job that this one follows; empty: a person has submitted it
avoided=${2:-}                 # bad nodes that this job was submitted without
restarts=${SLURM_RESTART_COUNT:-0}
chain=$run/jobs/$number.chain  # ids of the follow-up jobs, one a line
tries=$run/jobs/$number.tries  # starts since the newest checkpoint moved, and its name
next=                          # the follow-up job that waits for the end of this one
next_avoided=
step=                          # pid of srun, while it runs: what a signal does then, on_term and on_signal decide
busy=                          # set while on_term is at work
again=                         # set by a TERM that comes meanwhile

say() { printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*" >&2; }

# Slurm's TERM goes to all processes of this script; a question that is under way shall be answered.
ask() { timeout -s KILL 60 bash -c 'trap "" TERM; exec "$@"' ask "$@"; }

finish() {  # end with a code, and let nothing follow
    [ -z "$next" ] || drop "$next"
    exit "$1"
}

standing() {  # how Slurm sees this job now; nothing if it does not answer
    local told
    trap '' TERM
    told=$(SLURM_TIME_FORMAT=standard ask scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || return
    told=" ${told#* UserId=} "  # behind the job's name, which may be any text
    if [[ $told =~ \ Restarts=([0-9]+)\  ]] && [ "${BASH_REMATCH[1]}" -gt "$restarts" ]; then
        echo requeued  # by Slurm itself or by an administrator
        return
    fi
    # While a job ends its state is COMPLETING whatever ended it (22.05), so other fields must tell.
    case $told in
        *" Reason=TimeLimit "* | *" JobState=TIMEOUT "*) echo "at its time limit" ;;
        *" Reason=NodeDown "* | *" JobState=NODE_FAIL "*) echo "without one of its nodes" ;;
        *" JobState=PREEMPTED "* | *" JobState=COMPLETING "*" PreemptTime="[0-9]*) echo preempted ;;
        *" JobState=CANCELLED "* | *" JobState=COMPLETING "*) echo cancelled ;;
        *) echo running ;;
    esac
}

is_node() { [[ $1 =~ ^[A-Za-z0-9._-]+$ ]] && ask scontrol show node "$1" >/dev/null 2>&1; }

bad_nodes() {  # names in RUN/bad-nodes as Slurm knows them, with commas
    local path name found='' LC_ALL=C  # in the order that submit names them in
    trap '' TERM
    for path in "$run"/bad-nodes/*; do
        [ -e "$path" ] || continue
        name=${path##*/}
        if is_node "$name"; then
            found=$found,$name
        elif is_node "${name%%.*}"; then  # its host name has a domain
            found=$found,${name%%.*}
        else
            say "cannot leave out $path: Slurm does not know a node of that name"
        fi
    done
    echo "${found#,}"
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
    local bad=$1 said file=$script before=$next options=()
    [ -n "$next" ] && [ "$bad" = "$next_avoided" ] && return 0
    [ -f "$file" ] || file=$0  # Slurm's own copy
    [ -n "$bad" ] && options=("--exclude=${excluded:+$excluded,}$bad")
    options+=(--parsable "--dependency=afterany:$SLURM_JOB_ID" --kill-on-invalid-dep=yes)
    if said=$(outside sbatch "${options[@]}" "$file" "$SLURM_JOB_ID" "$bad" 2>&1); then
        said=${said##*$'\n'}
        next=${said%%;*}
    else
        say "no follow-up job: $said"
        next=$(queued "$before")
        if [ -z "$next" ]; then
            next=$before
            return 1
        fi
        say "but job $next was queued"
    fi
    next_avoided=$bad
    echo "$next" >>"$chain" || say "cannot write $chain: status and stop will not know job $next"
    say "job $next follows${bad:+, without $bad}"
    [ -z "$before" ] || drop "$before"
}

queued() {  # a follow-up besides this one: a controller with much to do takes a job, and its answer is lost
    local id depends name found=
    trap '' TERM
    while read -r id depends name; do
        [[ $depends =~ ^afterany:$SLURM_JOB_ID([^0-9]|$) ]] || continue
        [ "$id" = "$1" ] || [ "$name" != "${SLURM_JOB_NAME:-}" ] || found=$id
    done < <(ask squeue -h -t PENDING -u "$(id -un)" -o '%i %E %j' 2>/dev/null)
    echo "$found"
}

drop() {  # a follow-up that has not started yet out of the queue
    [ "$1" = "$next" ] && next=
    # scancel fails for a job that somebody else, e.g. `lmscale stop --now`, has just cancelled.
    if ! ask scancel --quiet --state=PENDING "$1" && ! gone "$1"; then
        say "cannot cancel job $1, which was to follow"
    fi
    forget "$1"
}

gone() {
    local left
    left=$(ask squeue -h -t PENDING -j "$1" -o %i 2>/dev/null) && [ -z "$left" ]
}

forget() {  # a job that is no part of the chain after all
    local one kept=
    [ -f "$chain" ] || return
    while read -r one; do
        [ "$one" = "$1" ] || kept+=$one$'\n'
    done <"$chain"
    printf %s "$kept" >"$chain.tmp" && mv -f "$chain.tmp" "$chain"
}

newest_checkpoint() {
    local path found=
    for path in "$run"/checkpoints/step-*-a*; do
        [ -d "$path" ] && [[ $path != *.tmp ]] && found=${path##*/}
    done
    echo "$found"
}

count_start() {  # so that a run which dies again and again is not started for ever
    local vain=0 before='' newest
    newest=$(newest_checkpoint)
    if [ -n "${LMSCALE_FRESH:-}" ] || [ ! -f "$tries" ]; then
        vain=0
    else
        read -r vain before <"$tries"
        if [ "$newest" = "$before" ] && [[ $vain =~ ^[0-9]+$ ]]; then vain=$((vain + 1)); else vain=0; fi
    fi
    if ! echo "$vain $newest" >"$tries"; then
        say "cannot write $tries, so starts cannot be counted: not started"
        finish 75
    fi
    [ "$vain" -le "$max_restarts" ] && return
    say "not started again: $max_restarts restarts without a newer checkpoint (cluster.max_restarts)"
    echo "$max_restarts restarts without a newer checkpoint; then job $SLURM_JOB_ID" >"$run/stop"
    finish 75
}

# Always USR2: srun passes it on, while for TERM it kills the tasks at once, before they can save.
# shellcheck disable=SC2317  # called by traps
save() { kill -s USR2 "$step" 2>/dev/null; }

# shellcheck disable=SC2317
on_term() {  # from scancel, at the time limit, for preemption, or because of a dead node
    if [ -z "$step" ]; then  # not begun, or over: what comes next looks for itself
        asked=143
        return
    fi
    save
    again=yes
    [ -z "$busy" ] || return  # the one that is under way looks once more: two would queue two jobs
    busy=yes
    local why
    for _ in {1..5}; do
        again=
        why=$(standing)
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

# shellcheck disable=SC2317
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
        why=$(standing)
        [ -e "$run/stop" ] && finish "$code"
        case $why in
            requeued) return ;;
            cancelled)
                say "cancelled: not started again"
                finish "$code" ;;
            "")  # the controller is away; a follow-up looks for itself how this job has ended
                [ -n "$next" ] && return
                say "Slurm does not answer: asking again" ;;
            *)
                bad=$(bad_nodes)
                # A controller that died just after it had taken a job may have forgotten it.
                if [ -n "$next" ] && ! ask scontrol show job "$next" >/dev/null 2>&1; then
                    forget "$next"
                    next=
                fi
                [ "$why" = running ] && [ "$bad" = "$avoided" ] && put_back && return
                follow_up "$bad" && return ;;
        esac
        rest $pause
        pause=10
    done
    say "not started again: the same command goes on from the newest checkpoint"
}

put_back() {  # this job into the queue; it keeps its options, so another node to leave out needs a follow-up
    [ "$requeue" = yes ] || return
    # Slurm ends this script as soon as it has put the job back.
    if ask scontrol requeue "$SLURM_JOB_ID" || [ "$(standing)" = requeued ]; then
        [ -z "$next" ] || drop "$next"
        return 0
    fi
    say "Slurm does not requeue this job"
    return 1
}

decide() {  # the code of srun is the highest of all tasks: in rank mode not the one that tells most
    local seen wanted
    [ -f "$codes" ] || return
    seen=" $(tr '\n' ' ' <"$codes")"
    rm -f "$codes"
    for wanted in 87 78 65 86 2 1 75 85; do
        if [[ $seen == *" $wanted "* ]]; then
            code=$wanted
            return
        fi
    done
}

end() {  # with the code of a start; where another one may cure it, that is arranged first
    code=$1
    if [ -e "$run/stop" ]; then
        [ "$code" = 85 ] && code=0
        finish "$code"
    fi
    case $code in
        75 | 85 | 1) go_on ;;
        *)
            # Beyond 128 + 64 there is no signal: 255 is srun's word for an option it does not know.
            if [ "$code" -le 128 ] || [ "$code" -gt 192 ]; then finish "$code"; fi
            go_on ;;
    esac
    exit "$code"
}

# shellcheck disable=SC2317  # not every run has commands of its site
unprepared() {  # a command of the site has ended with a code
    say "this failed with $1: $2"
    [ -n "$asked" ] || [ "$1" -gt 128 ] || finish 78
    end "${asked:-$1}"  # a signal to all processes of this job has ended it: no fault of its own
}

# ---- may this job start? -------------------------------------------------------------------------

export LMSCALE_START=slurm-$SLURM_JOB_ID-$restarts
codes=$run/jobs/$number.codes-$LMSCALE_START
rm -f "$run/jobs/$number.codes"-*
unset LMSCALE_FRESH LMSCALE_DEADLINE RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
if [ -z "$follows" ] && [ "$restarts" = 0 ]; then
    export LMSCALE_FRESH=1  # a person's start: the budget of restarts begins anew
fi
say "$LMSCALE_START on $SLURM_JOB_NUM_NODES node(s): $SLURM_JOB_NODELIST"
if [ -n "$follows" ]; then
    told=$(ask scontrol --oneliner show job "$follows" 2>/dev/null)
    case " ${told#* UserId=} " in
        *" JobState=CANCELLED "* | *" JobState=PENDING "* | *" JobState=RUNNING "*)
            say "job $follows was cancelled, or goes on itself: nothing to do"
            forget "$SLURM_JOB_ID"
            exit 0 ;;
    esac
fi
recorded=$run/jobs/$number.json
if [ -f "$recorded" ] && [ -n "${LMSCALE_FRESH:-}" ] && ! grep -q "\"job\": \"$SLURM_JOB_ID\"" "$recorded"; then
    by_hand=$SLURM_JOB_ID  # sbatch of this file: status and stop shall know it
fi
if [ -f "$chain" ]; then  # left by an earlier start of this job
    while read -r one; do
        [ "$one" = "$SLURM_JOB_ID" ] && next= || next=$one
    done <"$chain"
    [ -z "$next" ] || drop "$next"
fi
[ -z "${by_hand:-}" ] || echo "$by_hand" >>"$chain" || say "cannot write $chain: status will not know this job"
if [ -e "$run/stop" ]; then
    say "stopped by $run/stop: \`lmscale resume\` goes on"
    exit 0
fi
count_start
[ "$requeue" = no ] && follow_up "$(bad_nodes)"  # now: the node of this script may lose power later

# ---- the site's own ------------------------------------------------------------------------------

set +u  # module functions and profiles read variables that are not set
# nothing is set: cluster.slurm.prolog, cluster.slurm.modules
set -u

# ---- what the tasks are told ---------------------------------------------------------------------

# nothing
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

# ---- one start -----------------------------------------------------------------------------------

trap on_term TERM
[ "$signal" = TERM ] || trap on_signal "$signal"
if [ "$asked" = 85 ] && [ "$launch" = node ] && [ "${LMSCALE_DEADLINE:-0}" -gt "$(date +%s)" ]; then
    asked=  # Slurm may be a minute early, and the supervisors keep the time themselves
fi
if [ -n "$asked" ]; then
    say "asked to end before the ranks were started"
    end "$asked"
fi
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" \
    "${srun_options[@]}" "${task[@]}" "${command[@]}" &
step=$!
[ -z "$asked" ] || save  # it came in between
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal that is trapped interrupts wait
wait "$step"
code=$?
step=
decide
say "$LMSCALE_START has ended with $code"
end "$code"
