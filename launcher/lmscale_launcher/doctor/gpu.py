"""Checks of NVIDIA GPUs by what the driver reports, without torch."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmscale_launcher.doctor.command_result import CommandResult, RunningCommand, run_command
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
    """One line of nvidia-smi; unknown numbers are None."""

    index: str
    name: str
    total_mib: int | None
    used_mib: int | None
    driver: str
    broken: str  # a field in which the driver reports that it cannot access the GPU
    ecc_errors: int = 0
    row_failure: bool = False
    row_pending: bool = False


@dataclass(frozen=True, slots=True)
class Driver:
    """The report of the driver of this host."""

    state: Literal["none", "listed", "failing", "hung"]
    gpus: tuple[Gpu, ...] = ()
    count: int = 0  # also where only /proc is readable
    problem: str = ""


def start_query() -> RunningCommand:
    """Start the query for all fields that the check needs."""
    return _query(f"{_BASIC},{_HEALTH}")


def read(
    answer: CommandResult, *, driver: Path = _DRIVER, pci: Path = _PCI, timeout_s: float = ANSWER_S
) -> Driver:
    """Parse the result of the query; an old driver, which lacks some fields, is queried again for fewer."""
    if answer.state == "ended" and "not a valid field" in answer.out + answer.err:
        answer = run_command(_argv(_BASIC), timeout_s=timeout_s)
    if answer.state == "missing":
        count = len(list(driver.iterdir())) if driver.is_dir() else 0
        return (
            Driver("listed", count=count)
            if count
            else _without_driver(pci, "no nvidia-smi and no driver")
        )
    if answer.state == "hung":
        return Driver("hung", problem=f"nvidia-smi: {answer.failure}")
    if not answer.succeeded:
        problem = f"nvidia-smi: {answer.failure}"
        if driver.is_dir():
            return Driver("failing", problem=problem)
        return _without_driver(pci, problem)
    gpus = tuple(
        _gpu(row) for row in csv.reader(answer.out.splitlines(), skipinitialspace=True) if row
    )
    return Driver("listed", gpus, len(gpus))


def assigned(env: Mapping[str, str]) -> int | None:
    """Number of GPUs that the launcher or scheduler has assigned to this process; None where unknown."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return count_gpus({"CUDA_VISIBLE_DEVICES": env["CUDA_VISIBLE_DEVICES"]})
    count = env.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdecimal() else None


def check(driver: Driver, env: Mapping[str, str], *, ranks: int) -> list[Finding]:
    """Whether this host's GPUs are present, are enough for `ranks`, and are healthy."""
    given = assigned(env)
    if given == 0:
        return [ok("GPUs", "none for this job: its ranks train on the CPU")]
    if driver.state == "hung":
        hint = "the driver hangs (see `dmesg | grep Xid`): drain the node and restart it"
        return [fail("GPUs", driver.problem, hint)]
    if driver.state == "failing":
        hint = "see `dmesg | grep -i nvidia`; drain the node, reload the driver or restart the node"
        return [fail("GPUs", driver.problem, hint)]
    if driver.state == "none":
        if given is None:
            return [ok("GPUs", f"none ({driver.problem}): ranks train on the CPU over gloo")]
        hint = "load the driver on this node, or mount it into the container"
        return [
            warn(
                "GPUs",
                f"{given} for this job, but {driver.problem}: ranks would train on CPUs",
                hint,
            )
        ]
    return [_enough(driver, env, given, ranks), *_health(_visible(driver.gpus, env))]


def _enough(driver: Driver, env: Mapping[str, str], given: int | None, ranks: int) -> Finding:
    by_slice = "MIG-" in env.get("CUDA_VISIBLE_DEVICES", "")  # slices of a GPU, not listed as GPUs
    usable = driver.count if given is None else given if by_slice else min(driver.count, given)
    fact = f"{driver.count} listed" + (f", {given} for this job" if given is not None else "")
    if given is not None and usable < given:
        hint = "a GPU has fallen off the bus (see `dmesg | grep Xid`): drain the node, restart it"
        return fail("GPUs", fact, hint)
    if usable >= ranks:
        return ok("GPUs", f"{fact}, {ranks} rank(s)")
    if given is None:
        hint = "other nodes may have more: drain the node; or lower cluster.ranks_per_node"
        return fail("GPUs", f"{fact}, too few for {ranks} ranks", hint)
    # This holds for every node of the job, so the node is not the cause; the ranks refuse it with a message.
    hint = "request more (cluster.gpus_per_node), or lower cluster.ranks_per_node"
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
            fact += ", rows are waiting for a reset" if gpu.row_pending else ""
            hint = f"reset it when idle: nvidia-smi --gpu-reset -i {gpu.index}"
            found.append(warn(what, f"{gpu.name}: {fact}", hint))
        elif gpu.total_mib and gpu.used_mib and gpu.used_mib > 0.1 * gpu.total_mib:
            fact = f"{gpu.name}: {gpu.used_mib:,} of {gpu.total_mib:,} MiB are in use already"
            hint = "`nvidia-smi` names the processes: end them, or choose another GPU"
            found.append(warn(what, fact, hint))
    return found


def _visible(gpus: tuple[Gpu, ...], env: Mapping[str, str]) -> tuple[Gpu, ...]:
    visible = [entry.strip() for entry in env.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    visible_gpus = tuple(gpu for gpu in gpus if gpu.index in visible)
    return visible_gpus or gpus  # given by uuid, or not given


def _without_driver(pci: Path, problem: str) -> Driver:
    """No driver answers: a failure where there are GPUs, a CPU machine where there are none."""
    for device in pci.iterdir() if pci.is_dir() else ():
        try:
            maker, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if maker.strip() == "0x10de" and kind.startswith("0x0302"):  # NVIDIA, 3D controller
            return Driver("failing", problem=f"{problem}, but {device.name} is an NVIDIA GPU")
    return Driver("none", problem=problem)


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


def _query(fields: str) -> RunningCommand:
    return RunningCommand(_argv(fields), timeout_s=ANSWER_S)


def _argv(fields: str) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
