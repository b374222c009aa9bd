"""The environment that a job starts with: the user's, without what describes the job one sits in oneself."""

import re
from collections.abc import Mapping

# Left in, they would tell the new job that it is a task of the old one: srun would ask for the old job's nodes,
# ranks would take the old one's numbers. Options in SBATCH_* and SRUN_* would come before those of the run file.
_OF_A_JOB = re.compile(
    r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|PMIX|PMI|OMPI|PRTE|HYDRA|HYDI|LOCAL|MASTER|LMSCALE|TORCHELASTIC)_"
    r"|MPI_LOCAL|(RANK|WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_RANK|ROLE_WORLD_SIZE)\Z"
)
_KEPT = ("SLURM_CONF",)  # where the cluster is, not which job this is


def scrubbed(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as it would be outside of any job of Slurm, MPI, torchrun or lmscale."""
    return {key: value for key, value in env.items() if key in _KEPT or not _OF_A_JOB.match(key)}
