#!/bin/bash
@{sbatch}

# One submission of a run, queued by `lmscale submit`; `sbatch` of this file by hand does the same. It
# runs on the first node of the job and needs bash, coreutils and Slurm's commands there, not Python.
# All decisions (requeue, follow-up jobs, signals, exit codes) are in the library beside this file.
# A site copies cluster/slurm/job.sh, edits its part and names the copy in cluster.slurm.template;
# @ and a name in braces is replaced at submission, and each of them must stay.

# shellcheck disable=SC1091,SC2016,SC2034,SC2054,SC2154  # values are for the library, its results for srun
# ---- values of this run --------------------------------------------------------------------------

@{values}
srun_options=(@{srun})
command=(@{command})

set -u
asked=
trap 'asked=85' "$signal"; trap 'asked=143' TERM  # until the library handles signals
[ -r @{library} ] || { echo "job $SLURM_JOB_ID on $(hostname): cannot read "@{library} >&2; exit 75; }
. @{library} || exit 78
job_begin 1 "$@"  # may this job start?

# ---- the site's part: modules and commands before the ranks start --------------------------------

set +u  # module functions and profiles may read unset variables
@{setup}
set -u
@{exports}

# ---- one start of the ranks ----------------------------------------------------------------------

job_environment
job_ready
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" \
    "${srun_options[@]}" "${task[@]}" "${command[@]}" &
job_wait $!
