"""Environment variables of launchers and schedulers: one list of each kind, and scrubbing by them.

A process that starts a *new* job must not hand down the variables of the job that it belongs to itself:
srun would use the old job's nodes, and ranks would take the old job's numbers.
"""

import re
from collections.abc import Mapping

# What torchrun, accelerate and the supervisor set for each rank; World.from_env reads them.
RANK = "RANK"
WORLD_SIZE = "WORLD_SIZE"
LOCAL_RANK = "LOCAL_RANK"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
RANK_VARIABLES = (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE)
MASTER_ADDR = "MASTER_ADDR"
MASTER_PORT = "MASTER_PORT"
START = "LMSCALE_START"  # the name of this start of the job, the same on all nodes

# The variables in which other launchers give RANK_VARIABLES, in that order.
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE")  # fmt: skip
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI
SLURM_STEP = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
PMIX_RANK = "PMIX_RANK"
# One of them is set in every rank that an MPI has started.
MPI_RANK_VARIABLES = (OPEN_MPI[0], PMIX_RANK, HYDRA[0])

# Of torchrun's agent: left in, torch looks for the agent's store instead of making its own.
TORCHRUN_PREFIX = "TORCHELASTIC_"

# Everything that describes a job of Slurm, MPI, torchrun or lmscale. Options in SBATCH_* and SRUN_*
# would also come before those of the run file. cluster/slurm/job_lib.sh has the same list in bash.
JOB_PREFIXES = (
    "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "PMIX_", "PMI_", "OMPI_", "PRTE_", "HYDRA_",
    "HYDI_", "MPI_LOCAL", "LOCAL_", "MASTER_", "LMSCALE_", TORCHRUN_PREFIX,
)  # fmt: skip
JOB_NAMES = frozenset(
    {RANK, WORLD_SIZE, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"}
)
KEPT_NAMES = frozenset({"SLURM_CONF"})  # where the cluster is, not which job this is
_OF_A_JOB = re.compile("|".join(map(re.escape, JOB_PREFIXES)))


def scrubbed(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as it would be outside of any job of Slurm, MPI, torchrun or lmscale."""
    return {name: value for name, value in env.items() if not describes_a_job(name)}


def describes_a_job(name: str) -> bool:
    """Whether a variable belongs to the job that a process is part of."""
    return name not in KEPT_NAMES and (name in JOB_NAMES or _OF_A_JOB.match(name) is not None)


def without_torchrun(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the variables of a torchrun agent."""
    return {name: value for name, value in env.items() if not name.startswith(TORCHRUN_PREFIX)}
