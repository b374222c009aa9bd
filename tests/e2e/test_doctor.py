"""`lmscale doctor` as a user runs it: a machine that can train, and machines that cannot."""

import json
from pathlib import Path
from typing import Any

from tests.support.jobs import lmscale

GROUPS = ["this machine", "torch", "GPUs", "deepspeed", "mpi", "slurm", "storage", "clock"]


def doctor(folder: Path, *argv: str, **env: str) -> tuple[int, list[dict[str, Any]], str]:
    done = lmscale("doctor", "--json", *argv, cwd=folder, **env)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_machine_that_can_train(tmp_path: Path) -> None:
    code, found, said = doctor(tmp_path)
    failing = [one for one in found if one["level"] == "fail"]
    assert (code, failing) == (0, []), said
    assert list(dict.fromkeys(one["group"] for one in found)) == GROUPS
    facts = {(one["group"], one["what"]): one["fact"] for one in found}
    assert "two processes connected" in facts["torch", "gloo"]
    assert "imports" in facts["deepspeed", "deepspeed"]
    assert "flock excludes a second start" in facts["storage", "locks"]
    assert all(one["hint"] for one in found if one["level"] == "warn"), "each with what to do"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_the_table_ends_with_a_conclusion(tmp_path: Path) -> None:
    done = lmscale("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in GROUPS] == GROUPS
    assert lines[-1].startswith("this machine can train: no check fails")
    assert "Traceback" not in done.stderr


def test_what_fails_is_named_with_78(tmp_path: Path) -> None:
    code, found, _ = doctor(tmp_path, TMPDIR="/proc/sys", GLOO_SOCKET_IFNAME="eth0,eth1")
    failing = {one["what"]: one for one in found if one["level"] == "fail"}
    assert code == 78
    assert set(failing) == {"gloo", "scratch"}
    assert "gloo accepts one name" in failing["gloo"]["fact"]
    assert all(one["hint"] for one in failing.values())


def test_a_cluster_of_slurm_needs_slurm(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("kind: slurm\nranks_per_node: 2\n")
    path = f"{Path(__file__).parent}:/nowhere"  # no sbatch there
    code, found, _ = doctor(tmp_path, "--cluster", "site.yaml", PATH=path)
    assert code == 78
    assert [one["what"] for one in found if one["level"] == "fail"] == ["slurm"]


def test_an_unknown_cluster_is_refused(tmp_path: Path) -> None:
    done = lmscale("doctor", "--cluster", "slrum", cwd=tmp_path)
    assert done.returncode == 78
    assert "slrum" in done.stderr
    assert done.stdout == ""
