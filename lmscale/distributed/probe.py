"""`python -m lmscale probe PART`: facts about torch, gloo, deepspeed and MPI as one line of JSON.

For `lmscale doctor`, which must not import them: each part may fail, hang or crash, so each is a process.
"""

import importlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmscale.base.errors import UsageError

Facts = dict[str, Any]
_LISTENING = "0A"  # in /proc/net/tcp


def main(argv: list[str]) -> int:
    """Print the facts of one part. What libraries print goes to standard error."""
    parts: dict[str, Callable[[], Facts]] = {
        "torch": _torch, "gloo": _gloo, "deepspeed": _deepspeed,
        "mpi": _mpi, "mpi-rank": _mpi_rank,
    }  # fmt: skip
    if len(argv) != 1 or argv[0] not in parts:
        raise UsageError(f"python -m lmscale probe PART: PART is one of {', '.join(parts)}")
    out = os.dup(1)
    os.dup2(2, 1)
    facts = parts[argv[0]]()
    os.write(out, (json.dumps(facts) + "\n").encode())
    return 0


def _torch() -> Facts:
    import torch
    import torch.distributed as dist

    with_cuda = torch.cuda.is_available()
    facts: Facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "available": with_cuda,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "threads": torch.get_num_threads(),
        "cpu_bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    }
    if with_cuda:
        facts["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        facts["devices"] = [_device(index) for index in range(torch.cuda.device_count())]
    return facts


def _device(index: int) -> Facts:
    import torch

    try:
        properties = torch.cuda.get_device_properties(index)
        facts: Facts = {
            "name": properties.name,
            "memory": properties.total_memory,
            # No tensor cores for it before Ampere: torch emulates it there.
            "bf16": properties.major >= 8,
        }
        one = torch.ones(64, 64, device=f"cuda:{index}")
        facts["works"] = float((one @ one).sum()) == 64.0**3
    except (
        RuntimeError
    ) as error:  # a wheel without this GPU's architecture, a broken GPU, one out of memory
        return {"name": f"GPU {index}", "error": str(error).strip().splitlines()[0]}
    return facts


def _gloo() -> Facts:
    import torch
    import torch.distributed as dist

    from lmscale.base.world import World
    from lmscale.distributed.process_group import distributed

    world = World.from_env(os.environ)
    with distributed(world, device=torch.device("cpu"), timeout_s=30.0):
        total = torch.ones(1)
        dist.all_reduce(total)
        return {"host": socket.gethostname(), "sum": int(total), "listens_on": _listens_on()}


def _listens_on() -> list[str]:
    """Addresses at which this process listens for peers, as the kernel lists them."""
    mine = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue  # the folder's own descriptor
        mine.add(target)
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            rows = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in mine:
                words = bytes.fromhex(fields[1].partition(":")[0])
                # The kernel writes 32-bit words as this machine keeps them.
                ordered = b"".join(
                    words[i : i + 4][:: -1 if sys.byteorder == "little" else 1]
                    for i in range(0, len(words), 4)
                )
                found.add(socket.inet_ntop(family, ordered))
    return sorted(found - {"0.0.0.0", "::"})  # those are the store's


def _deepspeed() -> Facts:
    # By name: only lmscale/engine/deepspeed uses it; this module only reports whether it could be used.
    deepspeed = importlib.import_module("deepspeed")
    ops = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    built = importlib.import_module("deepspeed.git_version_info").installed_ops
    facts: Facts = {"version": deepspeed.__version__, "built": [], "buildable": [], "not": []}
    for name, builder in sorted(ops.items()):
        if built.get(name):
            facts["built"].append(name)
        elif builder is not None and _buildable(builder):
            facts["buildable"].append(name)
        else:
            facts["not"].append(name)
    facts["missing"] = [tool for tool in ("ninja", "c++", "nvcc") if shutil.which(tool) is None]
    return facts


def _buildable(builder: Any) -> bool:
    try:
        return bool(builder.is_compatible(False))
    except (
        Exception
    ):  # each of some 20 builders searches for its own libraries; one that raises is not buildable
        return False


def _mpi() -> Facts:
    # Not initialized: alone, outside of mpirun, that may hang or abort, and Open MPI 5 then leaves its segments
    # in /dev/shm.
    importlib.import_module("mpi4py").rc.initialize = False
    MPI = importlib.import_module("mpi4py.MPI")  # fails in words where the wheel finds no library
    vendor, version = MPI.get_vendor()
    return {"vendor": vendor, "version": ".".join(str(part) for part in version)}


def _mpi_rank() -> Facts:
    MPI = importlib.import_module("mpi4py.MPI")
    facts = {"rank": MPI.COMM_WORLD.Get_rank(), "size": MPI.COMM_WORLD.Get_size()}
    # By hand: __main__ leaves by os._exit, which mpirun would take for a crash.
    MPI.Finalize()
    return facts
