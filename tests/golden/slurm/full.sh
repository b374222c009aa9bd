#!/bin/bash
#SBATCH --job-name=seven
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gres=gpu:h100:8
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH "--account=lab\'s own"
#SBATCH --qos=high
#SBATCH "--reservation=week 12"
#SBATCH "--constraint=h100|h200"
#SBATCH --exclusive
#SBATCH --exclude=gpu[013-014],gpu020
#SBATCH --nodelist=gpu[001-004]
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --chdir=/home/me/work
#SBATCH --output=/shared/runs/seven/logs/job-3.log
#SBATCH --open-mode=append
#SBATCH "--comment=a \"b\" \#1"
#SBATCH --mail-user me@site.org

# One submission of a run, queued by `lmscale submit`; `sbatch` of this file by hand does the same. It
# runs on the first node of the job and needs bash, coreutils and Slurm's commands there, not Python.
# All decisions (requeue, follow-up jobs, signals, exit codes) are in the library beside this file.
# A site copies cluster/slurm/job.sh, edits its part and names the copy in cluster.slurm.template;
# @ and a name in braces is replaced at submission, and each of them must stay.

# shellcheck disable=SC1091,SC2016,SC2034,SC2054,SC2154  # values are for the library, its results for srun
# ---- values of this run --------------------------------------------------------------------------

run=/shared/runs/seven
number=3  # of this submission in the run folder
script=/shared/runs/seven/jobs/3.sh  # this file; follow-up jobs are queued with it
launch=node  # srun starts one supervisor per node, or one task per rank
ranks_per_node=8
requeue=yes  # no: continue in follow-up jobs
excluded='gpu[013-014],gpu020'  # nodes that the run file excludes
signal=USR1  # sent by Slurm before the time limit
signal_lead=300  # seconds before it
time_limit=86400  # seconds; empty: none in the run file
max_restarts=5  # without a newer checkpoint
srun_options=(
    --export=ALL --kill-on-bad-exit=0 --cpus-per-task=64 --mpi=pmix --cpu-bind=none --label
)
command=(
    /opt/venv/bin/python -P -m lmscale train /shared/runs/seven/jobs/3.yaml --nproc 8
)

set -u
asked=
trap 'asked=85' "$signal"; trap 'asked=143' TERM  # until the library handles signals
[ -r /shared/runs/seven/jobs/3.lib.sh ] || { echo "job $SLURM_JOB_ID on $(hostname): cannot read "/shared/runs/seven/jobs/3.lib.sh >&2; exit 75; }
. /shared/runs/seven/jobs/3.lib.sh || exit 78
job_begin 1 "$@"  # may this job start?

# ---- the site's part: modules and commands before the ranks start --------------------------------

set +u  # module functions and profiles may read unset variables
source '/opt/my site/profile.sh' || unprepared $? 'source '"'"'/opt/my site/profile.sh'"'"''
ulimit -l unlimited || unprepared $? 'ulimit -l unlimited'
module load cuda/12.4 || unprepared $? 'module load cuda/12.4'
module load gcc || unprepared $? 'module load gcc'
set -u
export A='b c'

# ---- one start of the ranks ----------------------------------------------------------------------

job_environment
job_ready
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" \
    "${srun_options[@]}" "${task[@]}" "${command[@]}" &
job_wait $!
