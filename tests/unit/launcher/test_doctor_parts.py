"""What doctor makes of what machines say: samples of Slurm, mounts, libraries, and programs that do not answer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.doctor import file_systems as storage
from lmscale_launcher.doctor import host, probes
from lmscale_launcher.doctor import slurm_checks as slurm
from lmscale_launcher.doctor.command_result import CommandResult, run_command
from lmscale_launcher.doctor.findings import Finding
from lmscale_launcher.doctor.gpu import Driver

MOUNTS = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2,acregmax=30,local_lock=none
31 22 0:41 / /old rw - nfs server:/old rw,vers=3,nolock,local_lock=all
32 22 0:42 / /scratch rw - lustre mgs:/scratch rw,localflock
33 22 0:43 / /mnt/with\040blank rw - fuse.s3fs s3fs rw
34 22 0:44 / /dev/shm rw - tmpfs tmpfs rw
"""


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    return path


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    begun = time.monotonic()
    answer = run_command(["sh", "-c", f"sleep 47 & echo $! > {tmp_path}/pid; wait"], timeout_s=0.5)
    assert time.monotonic() - begun < 3
    assert answer.state == "hung"
    assert "no answer within" in answer.failure
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/cmdline").exists() and time.monotonic() < deadline:
        if b"sleep" not in Path(f"/proc/{child}/cmdline").read_bytes():
            break  # a zombie of the test's own reaper
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_failure_is_told_by_the_last_telling_line(tmp_path: Path) -> None:
    body = "echo first; echo 'the cause' >&2; echo ------ >&2; exit 3"
    assert (
        run_command([str(script(tmp_path, "it", body))], timeout_s=5).failure
        == "the cause (exit code 3)"
    )
    assert run_command(["no-such-program"], timeout_s=5).failure == "not found"
    assert run_command(["sh", "-c", "kill -11 $$"], timeout_s=5).failure == "killed by signal 11"
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    assert run_command([str(broken)], timeout_s=5).state == "missing"


def test_the_innermost_mount_counts(mounts: Path) -> None:
    assert storage.mount_of(Path("/home/me/runs"), mounts=mounts).kind == "nfs4"
    assert storage.mount_of(Path("/homely"), mounts=mounts).kind == "ext4"
    assert storage.mount_of(Path("/mnt/with blank/x"), mounts=mounts).kind == "fuse.s3fs"
    assert storage.mount_of(Path("/home"), mounts=mounts / "missing").kind == "unknown"


@pytest.mark.parametrize(
    ("path", "several", "level", "words"),
    [
        ("/home", True, "ok", "up to 30 s late"),
        ("/root", False, "ok", ""),
        ("/root", True, "warn", "shared file system"),
        ("/mnt/with blank", False, "warn", "bucket"),
        ("/dev/shm", False, "warn", "lost at a reboot"),
    ],
)
def test_each_kind_of_file_system_is_judged(
    mounts: Path, path: str, several: bool, level: str, words: str
) -> None:
    mount = storage.mount_of(Path(path), mounts=mounts)
    found = storage.kind("runs", Path(path), mount, several_nodes=several)
    assert found.level == level
    assert words in found.hint


def test_locks_that_hold_on_one_host_only_are_said(mounts: Path) -> None:
    answer = CommandResult("ended", 0, '{"flock": ""}')
    for path, level in (("/home", "ok"), ("/old", "warn"), ("/scratch", "warn")):
        mount = storage.mount_of(Path(path), mounts=mounts)
        found = storage.locks("locks", Path(path), answer, mount)
        assert found is not None
        assert found.level == level
    without = CommandResult("ended", 0, '{"flock": "Function not implemented"}')
    found = storage.locks("locks", Path("/x"), without, storage.Mount("lustre", frozenset()))
    assert found is not None
    assert found.level == "fail"
    assert "Function not implemented" in found.fact


def test_a_slow_disk_is_said_in_minutes_of_a_checkpoint() -> None:
    slow = storage.rate(
        "speed", Path("/x"), CommandResult("ended", 0, '{"seconds": 8.0}'), size=64 << 20
    )
    assert slow is not None
    assert slow.level == "warn"
    assert "8 MiB/s" in slow.fact
    assert "29m" in slow.hint


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct"):
        script(
            folder,
            name,
            f'[ "$1" = --version ] && echo "slurm-wlm 24.05.1" && exit\n{bodies.get(name, "")}',
        )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


CONFIG = "ClusterName = lab\nSLURM_VERSION = 24.05.1\nAccountingStorageType = (null)_none\n"
PARTITION = "PartitionName=main Default=YES MaxNodes=UNLIMITED MaxTime=01:00:00 MinNodes=0 State=UP"
SINFO = 'for i in 1 2 3 4; do echo "main|n$i|8|16000|idle|gpu:h100:4|(null)"; done'


def scontrol(config: str = CONFIG, partition: str = PARTITION) -> str:
    lines = config.replace("\n", "\\n")
    return f'case "$*" in *config*) printf "{lines}";; *partition*) echo "{partition}";; esac'


def by_what(found: list[Finding]) -> dict[str, Finding]:
    return {one.what: one for one in found}


def levels(found: list[Finding]) -> dict[str, str]:
    return {one.what: one.level for one in found}


def test_no_slurm_is_fine_until_a_cluster_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"PATH": "/nowhere"}
    assert levels(slurm.check(nowhere, None)) == {"slurm": "ok"}
    cluster = ClusterConfig.model_validate({"kind": "slurm"})
    assert levels(slurm.check(nowhere, cluster)) == {"slurm": "fail"}


def test_a_controller_that_hangs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol="exec sleep 60")
    monkeypatch.setattr(slurm, "ANSWER_S", 0.5)
    begun = time.monotonic()
    assert levels(slurm.check({}, None)) == {"controller": "warn"}
    (found,) = slurm.check({}, ClusterConfig.model_validate({"kind": "slurm"}))
    assert time.monotonic() - begun < 5
    assert found.level == "fail"
    assert "did not answer within" in found.fact
    assert "scontrol ping" in found.hint


def test_a_site_without_requeue_and_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = f"{CONFIG}JobRequeue = 0\nAuthInfo = socket=/x,cred_expire=30\n"
    fake_slurm(tmp_path, monkeypatch, scontrol=scontrol(config), sinfo=SINFO)
    found = by_what(slurm.check({"SBATCH_ACCOUNT": "lab"}, None))
    assert levels(list(found.values())) == {
        "this shell": "warn", "controller": "ok", "partition main": "ok", "accounting": "ok",
        "requeue": "warn",
    }  # fmt: skip
    assert "SBATCH_ACCOUNT" in found["this shell"].fact
    assert "cluster.slurm.requeue: false" in found["requeue"].hint
    assert (
        "4 node(s), time limit 1h00m, 4 GPUs per node, the default" in found["partition main"].fact
    )


def test_the_delay_of_a_requeue_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol=scontrol(f"{CONFIG}JobRequeue = 1\n"), sinfo=SINFO)
    assert "after 121 s" in by_what(slurm.check({}, None))["requeue"].fact
    config = f"{CONFIG}JobRequeue = 1\nAuthInfo = socket=/x,cred_expire=5\n"
    fake_slurm(tmp_path, monkeypatch, scontrol=scontrol(config), sinfo=SINFO)
    assert "after 6 s" in by_what(slurm.check({}, None))["requeue"].fact


def test_other_versions_and_closed_partitions_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = scontrol(CONFIG.replace("24.05", "25.11"), PARTITION.replace("=UP", "=DRAIN"))
    fake_slurm(tmp_path, monkeypatch, scontrol=body, sinfo=SINFO)
    found = by_what(slurm.check({}, None))
    assert found["versions"].level == "warn"
    assert "DRAIN" in found["partition main"].fact


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"nodes": 5}, "cluster.nodes"),
        ({"gpus_per_node": 8}, "cluster.gpus_per_node"),
        ({"time_limit": "2h"}, "cluster.time_limit"),
        ({"slurm": {"partition": "nope"}}, "cluster.slurm.partition"),
    ],
)
def test_what_a_partition_cannot_give_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, object], what: str
) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol=scontrol(), sinfo=SINFO)
    cluster = ClusterConfig.model_validate({"kind": "slurm", **section})
    assert [one.what for one in slurm.check({}, cluster) if one.level == "fail"] == [what]


def test_slurm_itself_judges_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig.model_validate({"kind": "slurm", "slurm": {"account": "lab"}})
    fake_slurm(tmp_path, monkeypatch, scontrol=scontrol(), sinfo=SINFO, sbatch="exit 0")
    assert by_what(slurm.check({}, cluster))["a job"].level == "ok"
    no = "echo 'allocation failure: Invalid account or account/partition combination specified' >&2; exit 1"
    fake_slurm(tmp_path, monkeypatch, scontrol=scontrol(), sinfo=SINFO, sbatch=no)
    (found,) = [one for one in slurm.check({}, cluster) if one.level == "fail"]
    assert found.what == "cluster.slurm.account"


def test_a_shell_left_over_from_a_job_is_told_from_one_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, squeue='[ "$3" = 7 ] && echo RUNNING', scontrol="exit 1")
    assert levels(slurm.check({"SLURM_JOB_ID": "7"}, None))["this shell"] == "ok"
    assert levels(slurm.check({"SLURM_JOB_ID": "8"}, None))["this shell"] == "warn"


def test_leftovers_in_shared_memory_are_told_from_files_in_use(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    left, used = shm / f"lmscale-test-{os.getpid()}-left", shm / f"lmscale-test-{os.getpid()}-used"
    left.write_bytes(b"x" * 1024)
    holder = subprocess.Popen(
        [sys.executable, "-c", f"file = open({str(used)!r}, 'wb'); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = host.leftovers()
        assert found is not None
        names = {str(path) for path in host.unused(shm)}
        assert str(left) in names
        assert str(used) not in names
    finally:
        holder.communicate(b"\n", timeout=10)
        left.unlink()
        used.unlink()


def test_a_host_name_that_only_this_host_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = CommandResult("ended", 0, "127.0.1.1      STREAM box\n127.0.1.1      DGRAM\n")
    assert host.host_name(loopback, {}, several=False).level == "ok"
    found = host.host_name(loopback, {}, several=True)
    assert found.level == "warn"
    assert "127.0.1.1" in found.fact
    assert "GLOO_SOCKET_IFNAME" in found.hint
    assert host.host_name(loopback, {"GLOO_SOCKET_IFNAME": "lo"}, several=True).level == "ok"
    assert host.host_name(loopback, {"GLOO_SOCKET_IFNAME": "ib9"}, several=True).level == "warn"
    outside = CommandResult("ended", 0, "10.0.0.7        STREAM box\n")
    assert host.host_name(outside, {}, several=True).level == "ok"
    assert host.host_name(CommandResult("ended", 2), {}, several=False).level == "warn"
    assert host.host_name(CommandResult("hung", seconds=2), {}, several=False).level == "warn"


@pytest.mark.parametrize("value", ["ib0,ib1", "^lo", "=eth0", "no-such-0"])
def test_gloo_takes_one_interface(value: str) -> None:
    assert host.interface_problem(value)
    assert not host.interface_problem("lo")


def test_torch_must_see_what_the_driver_lists() -> None:
    driver = Driver("listed", count=2)
    cpu = {"version": "2.13.0+cpu", "cuda": None}
    (found,) = probes.gpus(driver, cpu, {})
    assert found.level == "fail"
    assert "built without CUDA" in found.fact
    (found,) = probes.gpus(driver, {"version": "2.13.0", "cuda": "13.0", "devices": []}, {})
    assert "finds no GPU" in found.fact
    one = {"name": "H100", "memory": 80 << 30, "bf16": True, "works": True}
    both = {"version": "2.13.0", "cuda": "13.0", "devices": [one, one]}
    assert [found.level for found in probes.gpus(driver, both, {})] == ["ok", "ok"]
    fewer = {**both, "devices": [one]}
    assert [found.level for found in probes.gpus(driver, fewer, {})] == ["ok", "fail"]
    assert probes.gpus(driver, cpu, {"CUDA_VISIBLE_DEVICES": ""}) == []


def test_an_mpirun_of_another_library_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, "mpirun", "echo 'HYDRA build details:'; echo 'Version: 4.2.0'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = probes.mpi(os.environ, required=True)
    assert [one.level for one in found] == ["ok", "fail"]
    assert "MPICH's, mpi4py was built for Open MPI" in found[1].fact
