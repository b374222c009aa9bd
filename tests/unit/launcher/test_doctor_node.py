"""The check of a node against real faults: file systems, drivers, clocks and limits that are as bad as they can be."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.doctor import file_systems as storage
from lmscale_launcher.doctor import gpu as nvidia
from lmscale_launcher.doctor.findings import Finding, failures
from lmscale_launcher.doctor.node import check_node

Smi = Callable[[str], None]

HEALTHY = "0, NVIDIA H100, 81559, 4, 570.1, 0, 0, 0"


def by_what(found: list[Finding], what: str) -> Finding:
    return next(one for one in found if one.what == what)


def command(*argv: str | Path, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(autouse=True)
def plain_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody has given this process GPUs, and scratch files have a folder of their own."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Smi:
    """Put a program of this body on PATH as nvidia-smi."""

    def install(body: str) -> None:
        folder = tmp_path / "driver"
        folder.mkdir()
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return install


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if command("mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder).returncode != 0:
        pytest.skip("needs root to mount a small file system")
    yield folder
    assert command("umount", "-l", folder).returncode == 0


def test_a_sound_node_passes_within_a_second(tmp_path: Path) -> None:
    seconds = float("inf")
    for _ in range(3):  # other load on the machine only adds to it
        begun = time.monotonic()
        found = check_node(RunFolder(tmp_path), ranks=1)
        seconds = min(seconds, time.monotonic() - begun)
    assert not failures(found), found
    assert {"run folder", "clock", "GPUs", "shared memory", "open files", "scratch"} <= {
        one.what for one in found
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch"], "it leaves nothing"
    assert not list((tmp_path / "scratch").iterdir())
    assert seconds <= 1.0


def test_the_check_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lmscale_launcher.doctor.node import check_node;"
        f"check_node(Path({str(tmp_path)!r}), ranks=1); sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    )
    assert command(sys.executable, "-c", code).returncode == 0


def test_a_missing_run_folder_fails(tmp_path: Path) -> None:
    found = by_what(check_node(tmp_path / "not-mounted", ranks=1), "run folder")
    assert found.level == "fail"
    assert "shared file system" in found.hint


def test_a_read_only_mount_fails(disk: Path) -> None:
    assert command("mount", "-o", "remount,ro", disk).returncode == 0
    found = by_what(check_node(disk, ranks=1), "run folder")
    assert found.level == "fail"
    assert "Read-only" in found.fact
    assert "dmesg" in found.hint


def test_a_full_disk_fails_and_an_almost_full_one_is_said(disk: Path) -> None:
    found = check_node(disk, ranks=1)
    assert by_what(found, "run folder").level == "ok"
    assert by_what(found, "free space").level == "warn"
    assert "No space" in command("dd", "if=/dev/zero", f"of={disk}/filler").stderr
    found = check_node(disk, ranks=1)
    assert by_what(found, "run folder").level == "fail"
    assert "No space left" in by_what(found, "run folder").fact
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_scratch_space_must_be_there(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(disk))
    assert by_what(check_node(tmp_path, ranks=1), "scratch").level == "fail"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "of-the-login-node"))
    found = by_what(check_node(tmp_path, ranks=1), "scratch")
    assert found.level == "warn", "programs fall back to /tmp"
    assert "does not exist on this node" in found.fact


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A file system whose writers sleep in the kernel and cannot be killed, as with a dead file server."""
    image, folder = tmp_path / "image", tmp_path / "frozen"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    if shutil.which("mkfs.ext4") is None or shutil.which("fsfreeze") is None:
        pytest.skip("needs e2fsprogs and util-linux")
    assert command("mkfs.ext4", "-q", image).returncode == 0
    if command("mount", "-o", "loop", image, folder).returncode != 0:
        pytest.skip("needs root and a loop device")
    try:
        if command("fsfreeze", "-f", folder).returncode != 0:
            pytest.skip("this kernel freezes no file system")
        yield folder
    finally:
        command("fsfreeze", "-u", folder)
        assert command("umount", folder).returncode == 0 or command("umount", "-l", folder)


def test_storage_that_hangs_is_not_waited_for(
    frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_S", 1.0)
    begun = time.monotonic()
    found = check_node(frozen, ranks=1)
    assert time.monotonic() - begun < 5
    assert by_what(found, "run folder").level == "fail"
    assert "no answer within 1 s" in by_what(found, "run folder").fact


SHIFT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += atoi(getenv("SHIFT_S"));
    return code;
}
"""


@pytest.mark.parametrize(
    ("shift", "level", "words"),
    [(0, "ok", "agrees"), (20, "warn", "20.0 s ahead of"), (-90, "fail", "90.0 s behind")],
)
def test_a_wrong_clock_is_told_by_file_stamps(
    tmp_path: Path, shift: int, level: str, words: str
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler to shift a clock")
    source, library = tmp_path / "shift.c", tmp_path / "shift.so"
    source.write_text(SHIFT)
    done = command("gcc", "-shared", "-fPIC", "-o", library, source, "-ldl")
    assert done.returncode == 0, done.stderr
    code = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path;"
        "from lmscale_launcher.doctor.node import check_node;"
        "print(json.dumps([asdict(f) for f in check_node(Path(sys.argv[1]), ranks=1)]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, timeout=30, check=True,
        env={**os.environ, "LD_PRELOAD": str(library), "SHIFT_S": str(shift)},
    )  # fmt: skip
    found = by_what([Finding(**one) for one in json.loads(said.stdout)], "clock")
    assert found.level == level
    assert words in found.fact


def test_few_open_files_fail(tmp_path: Path) -> None:
    # In a process of its own: this one may have more files open than the limit lets it have.
    code = (
        "import json, resource, sys; from dataclasses import asdict; from pathlib import Path; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); "
        "from lmscale_launcher.doctor.node import check_node; "
        "print(json.dumps([asdict(one) for one in check_node(Path(sys.argv[1]), ranks=1)]))"
    )
    said = command(sys.executable, "-c", code, tmp_path)
    found = by_what([Finding(**one) for one in json.loads(said.stdout)], "open files")
    assert found.level == "fail"
    assert "ulimit -n" in found.hint


def test_too_few_cores_are_said(tmp_path: Path) -> None:
    found = by_what(check_node(tmp_path, ranks=1000), "cores")
    assert found.level == "warn"
    assert "cpus_per_task" in found.hint


def test_a_driver_that_hangs_fails(
    tmp_path: Path, smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "ANSWER_S", 0.5)
    smi("exec sleep 60")
    begun = time.monotonic()
    found = by_what(check_node(tmp_path, ranks=1), "GPUs")
    assert time.monotonic() - begun < 3
    assert found.level == "fail"
    assert "no answer within" in found.fact
    assert "drain" in found.hint


def test_enough_healthy_gpus_pass(tmp_path: Path, smi: Smi) -> None:
    smi(f"echo '{HEALTHY}'; echo '{HEALTHY.replace('0,', '1,', 1)}'")
    found = check_node(tmp_path, ranks=2)
    assert by_what(found, "GPUs").level == "ok"
    assert "2 listed" in by_what(found, "GPUs").fact
    assert not [one for one in found if one.what in ("GPU 0", "GPU 1")]


def test_a_gpu_that_fell_off_fails(
    tmp_path: Path, smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(f"echo '{HEALTHY}'")
    assert by_what(check_node(tmp_path, ranks=2), "GPUs").level == "fail"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = by_what(check_node(tmp_path, ranks=1), "GPUs")
    assert found.level == "fail"
    assert "1 listed, 2 for this job" in found.fact


def test_more_ranks_than_were_asked_for_is_not_the_nodes_fault(
    tmp_path: Path, smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(f"echo '{HEALTHY}'; echo '{HEALTHY.replace('0,', '1,', 1)}'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = by_what(check_node(tmp_path, ranks=2), "GPUs")
    assert found.level == "warn"
    assert "cluster.gpus_per_node" in found.hint


def test_a_job_without_gpus_does_not_care_for_the_driver(
    tmp_path: Path, smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("echo 'Unable to determine the device handle'; exit 15")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert by_what(check_node(tmp_path, ranks=2), "GPUs").level == "ok"


@pytest.mark.parametrize(
    ("line", "level", "words"),
    [
        ("0, NVIDIA H100, 81559, 4, 570.1, 0, 1, 0", "fail", "remapping has failed"),
        ("0, NVIDIA H100, [Unknown Error], 4, 570.1, 0, 0, 0", "fail", "Unknown Error"),
        ("0, NVIDIA H100, 81559, 4, 570.1, [GPU requires reset], 0, 0", "fail", "requires reset"),
        ("0, NVIDIA H100, 81559, 4, 570.1, 3, 0, 1", "warn", "3 uncorrected"),
        ("0, NVIDIA H100, 81559, 40000, 570.1, 0, 0, 0", "warn", "40,000 of 81,559 MiB"),
    ],
)
def test_a_sick_gpu_is_named(tmp_path: Path, smi: Smi, line: str, level: str, words: str) -> None:
    smi(f"echo '{line}'")
    found = by_what(check_node(tmp_path, ranks=1), "GPU 0")
    assert found.level == level
    assert words in found.fact


def test_an_old_driver_is_asked_for_less(tmp_path: Path, smi: Smi) -> None:
    smi(
        'case "$*" in *remapped*) echo "Field \\"remapped_rows.failure\\" is not a valid field to query."; '
        'exit 2;; *) echo "0, Tesla V100, 32510, 0, 418.2";; esac'
    )
    assert "1 listed" in by_what(check_node(tmp_path, ranks=1), "GPUs").fact


def test_a_driver_that_fails_is_told_from_a_machine_without_gpus(tmp_path: Path) -> None:
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    answer = nvidia.CommandResult("ended", 9, words)
    pci, nowhere = tmp_path / "pci", tmp_path / "nowhere"
    assert nvidia.read(answer, driver=nowhere, pci=nowhere).state == "none"
    device = pci / "0000:17:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    found = nvidia.read(answer, driver=nowhere, pci=pci)
    assert found.state == "failing"
    assert "0000:17:00.0 is an NVIDIA GPU" in found.problem
    assert nvidia.check(found, {}, ranks=1)[0].level == "fail"


def test_gpus_that_nobody_can_drive_are_said(tmp_path: Path) -> None:
    found = nvidia.Driver("none", problem="no nvidia-smi and no driver")
    (only,) = nvidia.check(found, {"CUDA_VISIBLE_DEVICES": "0,1"}, ranks=2)
    assert only.level == "warn"
    assert "would train on CPUs" in only.fact
