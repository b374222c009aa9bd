"""Numbers of GPUs and cores of this host, without torch."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_PROC = Path("/proc/driver/nvidia/gpus")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def count_gpus(env: Mapping[str, str], *, proc: Path = _PROC) -> int:
    """Number of GPUs that a process started with `env` can use."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _listed(visible)
    if (tool := shutil.which("nvidia-smi", path=env.get("PATH"))) is not None:
        try:
            done = subprocess.run(
                [tool, "-L"], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return 0  # ranks could not use a driver that does not answer, either
        return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return len(list(proc.iterdir())) if proc.is_dir() else 0


def count_gpus_here() -> int:
    """Number of GPUs that a process started with the environment of this process can use."""
    return count_gpus(os.environ)


def _listed(visible: str) -> int:
    """Entries of CUDA_VISIBLE_DEVICES; CUDA ignores everything from the first invalid one on."""
    count = 0
    for entry in visible.split(","):
        name = entry.strip()
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            break
        count += 1
    return count


def count_cores(*, cpu_max: Path = _CPU_MAX) -> int:
    """Cores this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max 100000": no quota
        return cores
