#!/bin/bash
#SBATCH --job-name=seven
#SBATCH --nodes=2-4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --signal=B:USR2@180
#SBATCH --requeue
#SBATCH --chdir=/home/me/work
#SBATCH --output=/shared/runs/seven/logs/job-1.log
#SBATCH --open-mode=append

# One submission of a run, queued by `lmscale submit`; `sbatch` of this file by hand does the same. It
# runs on the first node of the job and needs bash, coreutils and Slurm's commands there, not Python.
# All decisions (requeue, follow-up jobs, signals, exit codes) are in the library beside this file.
# A site copies cluster/slurm/job.sh, edits its part and names the copy in cluster.slurm.template;
# @ and a name in braces is replaced at submission, and each of them must stay.

# shellcheck disable=SC1091,SC2016,SC2034,SC2054,SC2154  # values are for the library, its results for srun
# ---- values of this run --------------------------------------------------------------------------

run=/shared/runs/seven
number=1  # of this submission in the run folder
script=/shared/runs/seven/jobs/1.sh  # this file; follow-up jobs are queued with it
launch=node  # srun starts one supervisor per node, or one task per rank
ranks_per_node=4
requeue=yes  # no: continue in follow-up jobs
excluded=''  # nodes that the run file excludes
signal=USR2  # sent by Slurm before the time limit
signal_lead=180  # seconds before it
time_limit=  # seconds; empty: none in the run file
max_restarts=3  # without a newer checkpoint
srun_options=(
    --export=ALL --kill-on-bad-exit=0 --cpus-per-task=8
)
command=(
    /opt/venv/bin/python -P -m lmscale train /shared/runs/seven/jobs/1.yaml --nproc 4
)

set -u
asked=
trap 'asked=85' "$signal"; trap 'asked=143' TERM  # until the library handles signals
[ -r /shared/runs/seven/jobs/1.lib.sh ] || { echo "job $SLURM_JOB_ID on $(hostname): cannot read "/shared/runs/seven/jobs/1.lib.sh >&2; exit 75; }
. /shared/runs/seven/jobs/1.lib.sh || exit 78
job_begin 1 "$@"  # may this job start?

# ---- the site's part: modules and commands before the ranks start --------------------------------

set +u  # module functions and profiles may read unset variables
# nothing is set: cluster.slurm.prolog, cluster.slurm.modules
set -u
# nothing

# ---- one start of the ranks ----------------------------------------------------------------------

job_environment
job_ready
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" \
    "${srun_options[@]}" "${task[@]}" "${command[@]}" &
job_wait $!
