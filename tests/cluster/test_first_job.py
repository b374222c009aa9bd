"""A new user, who has the README and a cluster: each command of its Slurm section, in its order."""

import re
import signal
import subprocess
import time
from pathlib import Path

from conftest import LMSCALE, User

from tests.support.jobs import clean_env
from tests.support.testbed import Testbed, wait_for

README = Path(__file__).parents[2] / "README.md"
FIVE_MINUTES_S = 300.0


def commands() -> list[list[str]]:
    """The command lines of the section, without their comments."""
    section = README.read_text().split("## On a Slurm cluster", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip().split("#")[0].split() for line in section.splitlines()]
    return [line for line in lines if line[:1] == ["lmscale"]]


def test_the_readmes_commands_in_their_order(user: User, whole: Testbed) -> None:
    begun = time.monotonic()
    # What the section tells to write: a run file run.yaml and the site's slurm.yaml, here for nodes without GPUs.
    (user.folder / "run.yaml").write_text((user.folder / f"{user.name}.yaml").read_text())
    (user.folder / "slurm.yaml").write_text((user.folder / "testbed.yaml").read_text())
    user.name = "run"
    done: set[str] = set()
    for number, (_, verb, *argv) in enumerate(commands()):
        if verb == "logs":
            follow(user, argv)
        else:
            assert user.do(verb, *argv, timeout=90).returncode == 0, (
                f"command {number}: {verb} {argv}"
            )
        if verb == "submit" and "--dry-run" in argv:
            assert not user.run_dir.exists(), "a dry run leaves nothing"
        elif verb == "submit":
            user.wait_step(2)
            assert time.monotonic() - begun < FIVE_MINUTES_S, "the first job trains"
        elif verb == "stop":
            assert user.status()["state"] == "stopped"
            assert not user.hosts()
        done.add(verb)
    assert done >= {"doctor", "submit", "status", "logs", "stop", "resume", "plan"}
    before = user.step()
    user.wait_start(len(user.starts()))
    wait_for(lambda: user.step() > before, 120, "it goes on after resume")
    user.must("stop", user.run_dir, "--now")


def follow(user: User, argv: list[str]) -> None:
    """`lmscale logs -f` until it has shown a step, ended by Ctrl-C."""
    assert user.bed is not None
    process = subprocess.Popen(
        [str(LMSCALE), "logs", *argv], cwd=user.folder, text=True, stdout=subprocess.PIPE,
        env=clean_env(SLURM_CONF=str(user.bed.conf)),
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        deadline = time.monotonic() + 60
        for line in process.stdout:
            assert time.monotonic() < deadline
            if re.search(r"step \d+/", line):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(10) == 0
