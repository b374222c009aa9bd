"""The environment of a run, for report and checkpoint, and the peak FLOP/s that MFU refers to."""

import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lmscale
from lmscale.base.world import World
from lmscale.config.schema import RunConfig
from lmscale.distributed.mesh import Mesh

# Dense peaks in FLOP/s by the makers' data sheets: (bf16 tensor cores, fp32 with TF32 off).
_GPU_PEAKS = {
    "B200": (2250e12, 80e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10": (125e12, 31.2e12),
    "V100": (0.0, 15.7e12),
}


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of one rank, and where the number comes from."""

    flops_per_s: float | None
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of one rank's device. All ranks call it at the same time, for on CPUs they share the cores.

    A GPU's is its data sheet's (None for one we do not know). A CPU's is measured, as the best of a few
    matrix products in this dtype with this rank's threads: data sheets say little about shared cores.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, (bf16, fp32) in _GPU_PEAKS.items():
            if model in name:
                value = bf16 if dtype in (torch.bfloat16, torch.float16) else fp32
                return Peak(value or None, f"data sheet of {name}")
        return Peak(None, f"unknown for {name}")
    size = 768
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begun)
    return Peak(
        2 * size**3 / best,
        f"measured, {size}^3 matrix products on {torch.get_num_threads()} threads",
    )


def environment(world: World, device: torch.device, *, engine: str, peak: Peak) -> dict[str, Any]:
    """Facts for the report, flat and readable."""
    facts: dict[str, Any] = {
        "lmscale": lmscale.__version__,
        "commit": commit() or "not a checkout",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "ranks": f"{world.size} ({world.local_size} per node)",
        "threads per rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "engine": engine,
        "peak per rank": f"{peak.flops_per_s / 1e9:,.0f} GFLOP/s ({peak.source})"
        if peak.flops_per_s
        else peak.source,
    }
    if device.type == "cuda":
        facts["CUDA"] = torch.version.cuda
    return facts


def layout(cfg: RunConfig, mesh: Mesh) -> str:
    """The parallel layout as text."""
    words = f"replicate {mesh.dp_size}"
    if cfg.engine.traits.shards_parameters:
        words = f"replicate {mesh.replicate_size} x shard {mesh.shard_size}"
    elif cfg.engine.traits.uses_zero_stage:
        words = f"ZeRO stage {cfg.engine.zero_stage} over {mesh.dp_size}"
    if mesh.tp_size > 1:
        words += f" x tp {mesh.tp_size}"
    if cfg.parallel.sequence_parallel:
        words += ", sequence parallel"
    return words if cfg.engine.offload == "none" else f"{words}, offload {cfg.engine.offload}"


def provenance(cfg: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The software and the process that made a checkpoint."""
    return {
        "lmscale": lmscale.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "world_size": world.size,
        "engine": cfg["engine"],
        "time": time.time(),
        "command": sys.argv,
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from, marked where it was changed since."""
    root = Path(lmscale.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
