"""`lmscale doctor`: all checks of this machine or a cluster, as one table."""

import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from lmscale import __version__
from lmscale.base.console import columns_of, has_colour, is_terminal
from lmscale.base.errors import ExitCode, UsageError
from lmscale.base.units import show_bytes
from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.doctor import file_systems, gpu, host, probes, slurm_checks
from lmscale_launcher.doctor.findings import Finding, fail, ok

_SAMPLE_BYTES = 64 << 20
_SMALL_SAMPLE_BYTES = 4 << 20  # where the other would not fit
_MARKS = {"ok": " ok ", "warn": "warn", "fail": "FAIL"}
_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}

Group = tuple[str, list[Finding]]


def doctor(*, cluster: str | None = None, as_json: bool = False, nodes: int = 0) -> int:
    """Check this machine, and a cluster by name. Exit code 78 if a check fails.

    `nodes`: run the check of a node on this many nodes of the (Slurm) cluster, too.
    """
    section = _cluster(cluster) if cluster is not None else None
    if nodes and (section is None or not cluster_of(section.kind).can_check_nodes):
        raise UsageError("--nodes needs --cluster with a cluster of kind slurm")
    groups: list[Group] = []
    table = _Table(sys.stdout)
    for group in _groups(section, nodes):
        groups.append(group)
        if not as_json:
            table.print_group(group)
    findings = [finding for _, group_findings in groups for finding in group_findings]
    if as_json:
        body = [
            {"group": name, **asdict(finding)}
            for name, group_findings in groups
            for finding in group_findings
        ]
        sys.stdout.write(json.dumps(body) + "\n")
    else:
        sys.stdout.write(f"\n{_conclusion(findings, section)}\n")
    bad = any(finding.level == "fail" for finding in findings)
    return int(ExitCode.CONFIG if bad else ExitCode.DONE)


def _cluster(name: str) -> ClusterConfig:
    from lmscale.config.run_file import configs_dir, load

    # A file in the current folder comes first, as one beside a run file does for `submit`.
    local_file = Path.cwd() / f"{name}.yaml"
    name = str(local_file) if local_file.is_file() else name
    # Any run serves: only its cluster section is used.
    return load(configs_dir() / "runs" / "smoke.yaml", [f"cluster={name}"]).cluster


def _groups(section: ClusterConfig | None, nodes: int) -> Iterator[Group]:
    env = os.environ
    tool = cluster_of(section.kind).tool if section else None
    several = section is not None and section.nodes > 1
    running = probes.Probes(
        env
    )  # torch takes seconds, so the probes run while other checks are made
    gpu_query, name_lookup = gpu.start_query(), host.start_name_lookup()
    yield "this machine", _machine(host.host_name(name_lookup.result(), env, several=several))
    driver = gpu.read(gpu_query.result())
    torch_findings, torch_facts = running.torch()
    yield "torch", [*torch_findings, *running.gloo()]
    yield "GPUs", _gpus(driver, torch_facts, env, section)
    yield "deepspeed", running.deepspeed()
    yield "mpi", probes.mpi(env, required=tool == "mpi")
    yield "slurm", slurm_checks.check(env, section if tool == "slurm" else None)
    storage, clock_offset = _storage(several)
    yield "storage", storage
    yield "clock", [*clock_offset, host.time_service()]
    if nodes and section is not None:
        yield "nodes", slurm_checks.check_nodes(section, nodes=nodes, folder=_run_parent())


def _machine(name: Finding) -> list[Finding]:
    found = [ok("lmscale", f"{__version__}, {Path(__file__).parents[2]}")]
    python = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036 a wheel can be forced onto an older one
        found.append(fail("python", python, "lmscale needs Python 3.11 or newer"))
    else:
        found.append(ok("python", python))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.append(
        ok("system", f"{platform.system()} {platform.release()}, {show_bytes(memory)} of memory")
    )
    parts = [host.cores(0), name, host.open_files(), host.locked_memory()]
    parts += [host.shared_memory(1, gpus=False), host.leftovers()]
    return [*found, *(finding for finding in parts if finding is not None)]


def _gpus(
    driver: gpu.Driver,
    facts: Mapping[str, object],
    env: Mapping[str, str],
    section: ClusterConfig | None,
) -> list[Finding]:
    ranks = 1
    if section is not None and cluster_of(section.kind).nodes_are_like_this_host:
        ranks = section.ranks_per_node or 1
    found = gpu.check(driver, env, ranks=ranks)
    if driver.gpus:
        names = ", ".join(sorted({device.name for device in driver.gpus}))
        found.append(ok("driver", f"{driver.gpus[0].driver}: {names}"))
    return found + probes.gpus(driver, facts, env)


def _run_parent() -> Path:
    """Where run folders are created by default: runs/ in the current folder, or that folder."""
    here = Path.cwd()
    return here / "runs" if (here / "runs").is_dir() else here


def _storage(several: bool) -> tuple[list[Finding], list[Finding]]:
    runs, scratch = _run_parent(), Path(os.environ.get("TMPDIR") or "/tmp")
    found: list[Finding] = []
    offset: list[Finding] = []
    for what, folder in (("runs", runs), ("scratch", scratch)):
        result = file_systems.start_touch(folder, size=4096).result()
        written = file_systems.writable(what, folder, result)
        if written.level != "ok":
            found.append(written)
            continue
        mount = file_systems.mount_of(folder)
        if what == "runs":
            found.append(file_systems.kind(what, folder, mount, several_nodes=several))
            skew = file_systems.clock_offset("file server", result, where=str(folder))
            offset += [skew] if skew else []
        locked = file_systems.locks("locks", folder, result, mount) if what == "runs" else None
        size = (
            _SAMPLE_BYTES
            if shutil.disk_usage(folder).free > 2 * _SAMPLE_BYTES
            else _SMALL_SAMPLE_BYTES
        )
        sample = file_systems.start_touch(folder, size=size, timeout_s=60.0).result()
        speed = file_systems.rate("speed", folder, sample, size=size)
        space = file_systems.free_space("free space", folder, warn_below=10 << 30)
        found += [finding for finding in (space, speed, locked) if finding is not None]
    return found, offset


class _Table:
    """Prints groups of findings, wrapped to the terminal; without wrapping where the output is not a terminal."""

    def __init__(self, stream: object) -> None:
        self._width = columns_of(stream) if is_terminal(stream) else 10_000
        self._coloured = has_colour(stream)

    def print_group(self, group: Group) -> None:
        """Print one group."""
        name, findings = group
        sys.stdout.write(f"{name}\n")
        for finding in findings:
            mark = _MARKS[finding.level]
            if self._coloured:
                mark = f"\033[{_COLOURS[finding.level]}m{mark}\033[0m"
            sys.stdout.write(f"  {mark}  {finding.what:<16}  {self._wrapped(finding.fact)}\n")
            if finding.hint:
                sys.stdout.write(f"{' ' * 26}-> {self._wrapped(finding.hint, more=3)}\n")
        sys.stdout.flush()

    def _wrapped(self, text: str, more: int = 0) -> str:
        room = max(30, self._width - 26 - more)
        lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)
        return f"\n{' ' * (26 + more)}".join(lines)


def _conclusion(findings: list[Finding], section: ClusterConfig | None) -> str:
    failed = [finding.what for finding in findings if finding.level == "fail"]
    warned = [finding.what for finding in findings if finding.level == "warn"]
    subject = f"a cluster of kind {section.kind}" if section else "this machine"
    warnings = f"; warnings: {', '.join(warned)}" if warned else ""
    if failed:
        verb = "fails" if len(failed) == 1 else "fail"
        return f"{subject} cannot run everything: {', '.join(failed)} {verb}{warnings}"
    return f"{subject} can train: no check fails{warnings}"
