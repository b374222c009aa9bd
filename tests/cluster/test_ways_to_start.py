"""The same run by other ways: ranks started by srun itself, PMIx, the script by hand, a job of one's own."""

import shutil
import subprocess

import pytest
from conftest import LMSCALE, User, losses_agree
from test_lives import WITHIN

from tests.support.jobs import Job, clean_env, finished_process
from tests.support.testbed import Testbed, wait_for

SHORT = ["train.steps=300", "train.stop_at=30"]  # the schedule is that of the undisturbed run


def first_losses_agree(user: User, undisturbed: Job, steps: int) -> None:
    """The run's lines are the first ones of the run that nobody disturbed."""
    losses_agree(user.lines(), undisturbed.lines()[:steps], WITHIN)


def test_one_task_a_rank_stops_when_asked_and_goes_on(
    user: User, whole: Testbed, undisturbed: Job
) -> None:
    """`launch: rank`: no supervisor; `lmscale stop` saves, `resume` goes on in a new job."""
    user.submit("cluster.slurm.launch=rank", *SHORT)
    user.wait_step(5)
    user.must("stop", user.run_dir, timeout=90)
    assert user.status()["state"] in ("stopped", "finished")
    user.must("resume", user.run_dir)
    user.wait_state("stopped", "finished", "failed")
    first_losses_agree(user, undisturbed, 30)


def test_the_script_by_hand(user: User, whole: Testbed, undisturbed: Job) -> None:
    """A dry run prints what a submission leaves in RUN/jobs; `sbatch` of it by hand does the same."""
    shown = user.must("submit", f"{user.name}.yaml", "--cluster", "testbed", *SHORT, "--dry-run")
    user.submit("train.steps=300", "train.stop_at=10")
    user.wait_state("stopped", "failed")
    script = user.run_dir / "jobs" / "1.sh"
    assert script.read_text() in shown
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True, timeout=60)
    config = user.run_dir / "jobs" / "1.yaml"
    config.write_text(config.read_text().replace("stop_at: 10", "stop_at: 30"))
    whole.run("sbatch", str(script))
    wait_for(lambda: user.step() == 30, 120, "it went on by hand")
    first_losses_agree(user, undisturbed, 30)


def test_srun_with_pmix(user: User, whole: Testbed, undisturbed: Job) -> None:
    """mpi4py finds the ranks of a job of one's own; no launcher of ours, no torchrun."""
    if "pmix" not in whole.run("srun", "--mpi=list") or not shutil.which(
        "ompi_info", path="/usr/bin"
    ):
        pytest.skip("Slurm's PMIx needs: apt-get install libpmix2 openmpi-bin")
    argv = ["srun", "--mpi=pmix", "-N2", "-n4", "--ntasks-per-node=2", "-t", "5", str(LMSCALE)]
    argv += ["train", f"{user.name}.yaml", "cluster.nodes=2", *SHORT]
    env = clean_env(SLURM_CONF=str(whole.conf))
    done = finished_process(argv, cwd=user.folder, env=env, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    first_losses_agree(user, undisturbed, 30)
