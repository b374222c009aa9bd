"""NVIDIA's GPUs as their driver shows them, without torch."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmscale_launcher.doctor.command_result import CommandResult, Question, run_command
from lmscale_launcher.doctor.findings import Finding, fail, ok, warn
from lmscale_launcher.gpus import count_gpus

# Without persistence mode the driver wakes each GPU for the query: 8 to 10 s with eight of them.
ANSWER_S = 20.0
_BASIC = "index,name,memory.total,memory.used,driver_version"
_HEALTH = "ecc.errors.uncorrected.volatile.total,remapped_rows.failure,remapped_rows.pending"
_DRIVER = Path("/proc/driver/nvidia/gpus")
_PCI = Path("/sys/bus/pci/devices")
_BROKEN = ("unknown error", "requires reset", "err!", "gpu is lost")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi; numbers it does not know are None."""

    index: str
    name: str
    total_mib: int | None
    used_mib: int | None
    driver: str
    broken: str  # a field in which the driver says that it cannot reach the GPU
    ecc_errors: int = 0
    row_failure: bool = False
    row_pending: bool = False


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver of this host says."""

    state: Literal["none", "listed", "failing", "hung"]
    gpus: tuple[Gpu, ...] = ()
    count: int = 0  # also where only /proc tells
    words: str = ""


def start_query() -> Question:
    """Ask for everything that a check wants to know."""
    return _query(f"{_BASIC},{_HEALTH}")


def read(
    answer: CommandResult, *, driver: Path = _DRIVER, pci: Path = _PCI, timeout_s: float = ANSWER_S
) -> Driver:
    """Understand the answer; an old driver, which does not know all fields, is asked again for fewer."""
    if answer.state == "ended" and "not a valid field" in answer.out + answer.err:
        answer = run_command(_argv(_BASIC), timeout_s=timeout_s)
    if answer.state == "missing":
        count = len(list(driver.iterdir())) if driver.is_dir() else 0
        return (
            Driver("listed", count=count) if count else _silent(pci, "no nvidia-smi and no driver")
        )
    if answer.state == "hung":
        return Driver("hung", words=f"nvidia-smi: {answer.words}")
    if not answer.good:
        words = f"nvidia-smi: {answer.words}"
        if driver.is_dir():
            return Driver("failing", words=words)
        return _silent(pci, words)
    gpus = tuple(
        _gpu(row) for row in csv.reader(answer.out.splitlines(), skipinitialspace=True) if row
    )
    return Driver("listed", gpus, len(gpus))


def allotted(env: Mapping[str, str]) -> int | None:
    """GPUs that whoever started this process gave it; None where nobody said."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return count_gpus({"CUDA_VISIBLE_DEVICES": env["CUDA_VISIBLE_DEVICES"]})
    said = env.get("SLURM_GPUS_ON_NODE", "")
    return int(said) if said.isdecimal() else None


def check(found: Driver, env: Mapping[str, str], *, ranks: int) -> list[Finding]:
    """Whether this host's GPUs are there, are enough for `ranks`, and are well."""
    given = allotted(env)
    if given == 0:
        return [ok("GPUs", "none for this job: its ranks train on the CPU")]
    if found.state == "hung":
        hint = "the driver hangs (see `dmesg | grep Xid`): drain the node and restart it"
        return [fail("GPUs", found.words, hint)]
    if found.state == "failing":
        hint = "see `dmesg | grep -i nvidia`; drain the node, load the driver anew or restart it"
        return [fail("GPUs", found.words, hint)]
    if found.state == "none":
        if given is None:
            return [ok("GPUs", f"none ({found.words}): ranks train on the CPU over gloo")]
        hint = "load the driver on this node, or mount it into the container"
        return [
            warn("GPUs", f"{given} for this job, but {found.words}: it would train on CPUs", hint)
        ]
    return [_enough(found, env, given, ranks), *_health(_ours(found.gpus, env))]


def _enough(found: Driver, env: Mapping[str, str], given: int | None, ranks: int) -> Finding:
    by_slice = "MIG-" in env.get("CUDA_VISIBLE_DEVICES", "")  # slices of a GPU, not listed as GPUs
    usable = found.count if given is None else given if by_slice else min(found.count, given)
    fact = f"{found.count} listed" + (f", {given} for this job" if given is not None else "")
    if given is not None and usable < given:
        hint = "a GPU has fallen off the bus (see `dmesg | grep Xid`): drain the node, restart it"
        return fail("GPUs", fact, hint)
    if usable >= ranks:
        return ok("GPUs", f"{fact}, {ranks} rank(s)")
    if given is None:
        hint = "its siblings may have more: drain the node; or lower cluster.ranks_per_node"
        return fail("GPUs", f"{fact}, too few for {ranks} ranks", hint)
    # Not this node's fault: every node of the job is as it is, and the ranks refuse it in words.
    hint = "ask for more (cluster.gpus_per_node), or lower cluster.ranks_per_node"
    return warn("GPUs", f"{fact}, too few for {ranks} ranks", hint)


def _health(gpus: tuple[Gpu, ...]) -> list[Finding]:
    found = []
    for gpu in gpus:
        what = f"GPU {gpu.index}"
        if gpu.broken:
            hint = f"nvidia-smi --gpu-reset -i {gpu.index}, or drain the node and restart it"
            found.append(fail(what, f"{gpu.name}: {gpu.broken}", hint))
        elif gpu.row_failure:
            hint = "its memory has no spare rows left: drain the node and have the GPU replaced"
            found.append(fail(what, f"{gpu.name}: row remapping has failed", hint))
        elif gpu.row_pending or gpu.ecc_errors:
            fact = f"{gpu.ecc_errors} uncorrected memory error(s) since the driver was loaded"
            fact += ", rows wait for a reset" if gpu.row_pending else ""
            hint = f"reset it when idle: nvidia-smi --gpu-reset -i {gpu.index}"
            found.append(warn(what, f"{gpu.name}: {fact}", hint))
        elif gpu.total_mib and gpu.used_mib and gpu.used_mib > 0.1 * gpu.total_mib:
            fact = f"{gpu.name}: {gpu.used_mib:,} of {gpu.total_mib:,} MiB are in use already"
            hint = "`nvidia-smi` names the processes: end them, or choose another GPU"
            found.append(warn(what, fact, hint))
    return found


def _ours(gpus: tuple[Gpu, ...], env: Mapping[str, str]) -> tuple[Gpu, ...]:
    visible = [entry.strip() for entry in env.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    ours = tuple(gpu for gpu in gpus if gpu.index in visible)
    return ours or gpus  # by uuid, or nobody said


def _silent(pci: Path, words: str) -> Driver:
    """No driver that answers: broken where there are GPUs, a CPU machine where there are none."""
    for device in pci.iterdir() if pci.is_dir() else ():
        try:
            maker, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if maker.strip() == "0x10de" and kind.startswith("0x0302"):  # NVIDIA, 3D controller
            return Driver("failing", words=f"{words}, but {device.name} is an NVIDIA GPU")
    return Driver("none", words=words)


def _gpu(row: list[str]) -> Gpu:
    padded = [cell.strip() for cell in row] + [""] * 8
    index, name, total, used, driver, ecc, failure, pending = padded[:8]
    broken = next((cell for cell in padded if any(word in cell.lower() for word in _BROKEN)), "")
    return Gpu(
        index, name, _number(total), _number(used), driver, broken, _number(ecc) or 0,
        failure.lower() in {"1", "yes"}, pending.lower() in {"1", "yes"},
    )  # fmt: skip


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _query(fields: str) -> Question:
    return Question(_argv(fields), timeout_s=ANSWER_S)


def _argv(fields: str) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
