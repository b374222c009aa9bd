"""The check of a node before its ranks start. It takes at most a second and does not use torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.doctor import file_systems as storage
from lmscale_launcher.doctor import gpu as nvidia
from lmscale_launcher.doctor import host
from lmscale_launcher.doctor.command_result import CommandResult
from lmscale_launcher.doctor.findings import Finding, warn

_MIN_RUN_BYTES = 2 << 30
_MIN_SCRATCH_BYTES, _NO_SCRATCH_BYTES = 1 << 30, 16 << 20


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """The result of checking one node."""

    findings: list[Finding]
    num_gpus: int  # GPUs that the driver lists, to be compared with other nodes


def check_node(folder: RunFolder | Path, *, ranks: int) -> list[Finding]:
    """Check this node for a run that is about to start `ranks` ranks here.

    A failure means that this node is the cause, not the run file: the run should resume without it.
    """
    path = folder.path if isinstance(folder, RunFolder) else folder
    return inspect_node(path, ranks=ranks).findings


def inspect_node(run: Path, *, ranks: int) -> NodeCheck:
    """Check this node; the result also has the number of its GPUs."""
    env = os.environ
    scratch = _scratch(env)
    run_write = storage.start_touch(run)
    scratch_write = storage.start_touch(scratch)
    gpu_query, name_lookup = nvidia.start_query(), host.start_name_lookup()
    driver = nvidia.read(gpu_query.result())
    several = env.get("LMSCALE_NODES", "1") != "1"
    run_result = run_write.result()
    findings = [
        storage.writable("run folder", run, run_result),
        storage.clock_offset("clock", run_result, where=str(run)),
        *nvidia.check(driver, env, ranks=ranks),
        host.shared_memory(ranks, gpus=driver.count > 0 and nvidia.assigned(env) != 0),
        host.cores(ranks),
        host.open_files(),
        host.locked_memory(),
        host.host_name(name_lookup.result(), env, several=several),
    ]
    if findings[0] is not None and findings[0].level == "ok":
        findings.append(storage.free_space("free space", run, warn_below=_MIN_RUN_BYTES))
    findings.append(_scratch_space(scratch, scratch_write.result()))
    return NodeCheck([finding for finding in findings if finding is not None], driver.count)


def _scratch(env: Mapping[str, str]) -> Path:
    # tempfile ignores a TMPDIR that cannot be written, and hangs with one that hangs.
    return Path(env.get("TMPDIR") or "/tmp")


def _scratch_space(scratch: Path, answer: CommandResult) -> Finding:
    written = storage.writable("scratch", scratch, answer)
    if storage.is_missing(answer):
        # sbatch exports the TMPDIR of the login node to every node; programs then fall back to /tmp.
        return warn(
            "scratch",
            f"TMPDIR={scratch} does not exist on this node",
            "unset it, or create the folder",
        )
    if written.level != "ok":
        return written
    return storage.free_space(
        "scratch", scratch, warn_below=_MIN_SCRATCH_BYTES, fail_below=_NO_SCRATCH_BYTES
    )
