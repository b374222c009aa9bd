"""Which variables describe a job."""

import re
from pathlib import Path

import pytest

from lmscale.base.env import JOB_NAMES, JOB_PREFIXES, KEPT_NAMES, scrubbed, without_torchrun

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "name",
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_WORLD_SIZE",
     "MASTER_ADDR", "LMSCALE_START", "SLURM_JOB_ID", "SLURMD_NODENAME", "SBATCH_PARTITION",
     "SRUN_DEBUG", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PRTE_X", "HYDRA_X", "HYDI_X",
     "MPI_LOCALRANKID", "TORCHELASTIC_RUN_ID", "SALLOC_ACCOUNT"],
)  # fmt: skip
def test_variables_of_a_job_are_left_out(name: str) -> None:
    assert scrubbed({name: "1", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "name", ["SLURM_CONF", "PATH", "RANKING", "MY_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]
)
def test_other_variables_stay(name: str) -> None:
    assert scrubbed({name: "1"}) == {name: "1"}


def test_torchruns_agent() -> None:
    env = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}
    assert without_torchrun(env) == {"RANK": "0"}


def test_the_job_scripts_list_is_the_same() -> None:
    """The bash list lacks torchrun's group and role names, which no batch script is given."""
    texts = [path.read_text() for path in (ROOT / "cluster" / "slurm").iterdir() if path.is_file()]
    lists = [
        found for text in texts for found in re.findall(r"case \$name in(.*?)esac", text, re.S)
    ]
    assert len(lists) == 1
    kept, dropped = lists[0].split(";;")[:2]
    patterns = set(re.findall(r"[A-Z_]+\*?", dropped))
    assert {name[:-1] for name in patterns if name.endswith("*")} == set(JOB_PREFIXES)
    assert {name for name in patterns if not name.endswith("*")} == {"RANK", "WORLD_SIZE"}
    assert JOB_NAMES - {"RANK", "WORLD_SIZE"} == {
        "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    }  # fmt: skip
    assert set(re.findall(r"[A-Z_]+", kept)) == set(KEPT_NAMES)
