"""Whether this process is one rank that another launcher has started, or must start ranks itself."""

import re
import zlib
from collections.abc import Mapping

from lmscale.base.env import HYDRA, OPEN_MPI, RANK_VARIABLES, SLURM_STEP

# Batch and interactive steps have ids from here on; a step of srun counts up from 0.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

_EQUAL_TASKS = re.compile(r"(\d+)(?:\(x\d+\))?")  # 4, or 2(x3): 2 on each of 3 nodes; not 3,2


def rank_env(env: Mapping[str, str]) -> dict[str, str] | None:
    """What to add to the environment of a rank; None when this process is not a rank and must supervise.

    torchrun's and accelerate's variables first, then MPI's, then those of a real Slurm step
    (SLURM_PROCID alone is set in every batch script). The caller gives `--nproc` precedence.
    Ranks of MPI get the address of the rendezvous from MPI itself (lmscale/distributed/mpi_rendezvous.py).
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    if "OMPI_COMM_WORLD_RANK" in env:
        return _translated(env, OPEN_MPI)
    if _real_step(env.get("SLURM_STEP_ID", "")):
        added = _translated(env, SLURM_STEP)
        return added if "PMIX_RANK" in env else added | _rendezvous(env, added)
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        return _translated(env, HYDRA)
    if "PMIX_RANK" in env:  # prun of PRRTE, whose ranks only MPI can count
        return {}
    return None


def _real_step(step: str) -> bool:
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _translated(env: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """The variables of another launcher under the names of torchrun. Missing ones are left out; World names them."""
    added = {
        name: env[given] for name, given in zip(RANK_VARIABLES, names, strict=True) if given in env
    }
    on_each = _EQUAL_TASKS.fullmatch(added.pop("LOCAL_WORLD_SIZE", ""))
    return added | ({"LOCAL_WORLD_SIZE": on_each[1]} if on_each else {})


def _rendezvous(env: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """The rendezvous of tasks of srun: on one host its loopback; on several the script sets MASTER_ADDR."""
    address = {}
    if "MASTER_ADDR" not in env and added.get("LOCAL_WORLD_SIZE") == added.get("WORLD_SIZE"):
        address["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in env:
        # All ranks must compute the same port: a number from the id of the job, below the ports that
        # Linux gives to outgoing connections (32768 and up).
        name = env.get("SLURM_JOB_ID", "").encode()
        address["MASTER_PORT"] = str(20_000 + zlib.crc32(name) % 10_000)
    return address
