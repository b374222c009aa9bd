"""Is this process one rank that somebody else has started, or the one that shall start ranks?"""

import zlib
from collections.abc import Mapping

# Batch and interactive steps have ids from here on; a step of srun counts up from 0.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

# Variables of each starter, for RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and a name of the job.
_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE")  # fmt: skip
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID")
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def rank_env(env: Mapping[str, str]) -> dict[str, str] | None:
    """What to add to the environment of a rank; None when this process is none and shall supervise.

    torchrun's and accelerate's variables first, then MPI's, then those of a real Slurm step
    (SLURM_PROCID alone stands in every batch script). The caller lets `--nproc` overrule all.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    if any(name.startswith(("OMPI_COMM_", "PMIX_RANK")) for name in env):
        return _translated(env, _MPI)
    if _real_step(env.get("SLURM_STEP_ID", "")):
        return _translated(env, _SLURM)
    return None


def _real_step(step: str) -> bool:
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _translated(env: Mapping[str, str], theirs: tuple[str, ...]) -> dict[str, str]:
    """Their variables in torchrun's words. What they do not tell stays out, and World names it."""
    added = {name: env[given] for name, given in zip(_OURS, theirs, strict=False) if given in env}
    added.setdefault("RANK", env.get("PMIX_RANK", "0"))
    local_size = added.get("LOCAL_WORLD_SIZE", "")
    if not local_size.isdecimal():  # Slurm writes e.g. "2(x3)"
        added.pop("LOCAL_WORLD_SIZE", None)
    one_host = local_size == added.get("WORLD_SIZE")
    if one_host and "MASTER_ADDR" not in env:
        added["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in env:
        # All ranks must agree without a word: a number from the job's name, below the ports that
        # Linux gives to outgoing connections (32768 and up).
        added["MASTER_PORT"] = str(20_000 + zlib.crc32(env.get(theirs[4], "").encode()) % 10_000)
    return added
