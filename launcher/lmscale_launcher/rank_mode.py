"""Is this process one rank that somebody else has started, or the one that shall start ranks?"""

import re
import zlib
from collections.abc import Mapping

from lmscale.base.env import HYDRA, OPEN_MPI, RANK_VARIABLES, SLURM_STEP

# Batch and interactive steps have ids from here on; a step of srun counts up from 0.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

_EQUAL_TASKS = re.compile(r"(\d+)(?:\(x\d+\))?")  # 4, or 2(x3): 2 on each of 3 nodes; not 3,2


def rank_env(env: Mapping[str, str]) -> dict[str, str] | None:
    """What to add to the environment of a rank; None when this process is none and shall supervise.

    torchrun's and accelerate's variables first, then MPI's, then those of a real Slurm step
    (SLURM_PROCID alone stands in every batch script). The caller lets `--nproc` overrule all.
    Where the ranks meet, MPI's ask MPI itself (lmscale/distributed/mpi_rendezvous.py).
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    if "OMPI_COMM_WORLD_RANK" in env:
        return _translated(env, OPEN_MPI)
    if _real_step(env.get("SLURM_STEP_ID", "")):
        added = _translated(env, SLURM_STEP)
        return added if "PMIX_RANK" in env else added | _meeting(env, added)
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        return _translated(env, HYDRA)
    if "PMIX_RANK" in env:  # prun of PRRTE, whose ranks only MPI can count
        return {}
    return None


def _real_step(step: str) -> bool:
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _translated(env: Mapping[str, str], theirs: tuple[str, ...]) -> dict[str, str]:
    """Their variables in torchrun's words. What they do not tell stays out, and World names it."""
    added = {
        name: env[given] for name, given in zip(RANK_VARIABLES, theirs, strict=True) if given in env
    }
    on_each = _EQUAL_TASKS.fullmatch(added.pop("LOCAL_WORLD_SIZE", ""))
    return added | ({"LOCAL_WORLD_SIZE": on_each[1]} if on_each else {})


def _meeting(env: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Where tasks of srun meet: on their one host; on several the template gives MASTER_ADDR."""
    found = {}
    if "MASTER_ADDR" not in env and added.get("LOCAL_WORLD_SIZE") == added.get("WORLD_SIZE"):
        found["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in env:
        # All ranks must agree without a word: a number from the job's name, below the ports that
        # Linux gives to outgoing connections (32768 and up).
        name = env.get("SLURM_JOB_ID", "").encode()
        found["MASTER_PORT"] = str(20_000 + zlib.crc32(name) % 10_000)
    return found
