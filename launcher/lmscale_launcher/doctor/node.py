"""What must hold on a node before its ranks start: at most a second, no torch."""

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

_ROOM_FOR_RUN = 2 << 30
_ROOM_FOR_SCRATCH, _NO_SCRATCH = 1 << 30, 16 << 20


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """One node, looked at."""

    findings: list[Finding]
    num_gpus: int  # that its driver lists, to be compared with its siblings'


def check_node(folder: RunFolder | Path, *, ranks: int) -> list[Finding]:
    """Look at this node with the eyes of a run that is about to start `ranks` ranks here.

    A failure says that this node, not the run file, is at fault: the run should go on without it.
    """
    path = folder.path if isinstance(folder, RunFolder) else folder
    return look_at_node(path, ranks=ranks).findings


def look_at_node(run: Path, *, ranks: int) -> NodeCheck:
    """The same, with what its siblings are compared by."""
    env = os.environ
    scratch = _scratch(env)
    asked_run = storage.start_touch(run)
    asked_scratch = storage.start_touch(scratch)
    asked_gpus, asked_name = nvidia.start_query(), host.start_name_lookup()
    driver = nvidia.read(asked_gpus.answer())
    several = env.get("LMSCALE_NODES", "1") != "1"
    in_run = asked_run.answer()
    found = [
        storage.writable("run folder", run, in_run),
        storage.clock_offset("clock", in_run, where=str(run)),
        *nvidia.check(driver, env, ranks=ranks),
        host.shared_memory(ranks, gpus=driver.count > 0 and nvidia.allotted(env) != 0),
        host.cores(ranks),
        host.open_files(),
        host.locked_memory(),
        host.host_name(asked_name.answer(), env, several=several),
    ]
    if found[0] is not None and found[0].level == "ok":
        found.append(storage.free_space("free space", run, warn_below=_ROOM_FOR_RUN))
    found.append(_scratch_room(scratch, asked_scratch.answer()))
    return NodeCheck([one for one in found if one is not None], driver.count)


def _scratch(env: Mapping[str, str]) -> Path:
    # tempfile would pass over a TMPDIR that cannot be written without a word, and hang with one that hangs.
    return Path(env.get("TMPDIR") or "/tmp")


def _scratch_room(scratch: Path, answer: CommandResult) -> Finding:
    written = storage.writable("scratch", scratch, answer)
    if storage.is_missing(answer):
        # Login nodes export theirs to every node; programs then fall back to /tmp.
        return warn(
            "scratch", f"TMPDIR={scratch} does not exist here", "unset it, or make the folder"
        )
    if written.level != "ok":
        return written
    return storage.free_space(
        "scratch", scratch, warn_below=_ROOM_FOR_SCRATCH, fail_below=_NO_SCRATCH
    )
