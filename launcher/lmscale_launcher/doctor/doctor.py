"""`lmscale doctor`: everything looked at, as one table."""

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
from lmscale.base.errors import ExitCode, UsageError
from lmscale.base.units import show_bytes
from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.doctor import (
    file_systems as storage,
)
from lmscale_launcher.doctor import (
    gpu as nvidia,
)
from lmscale_launcher.doctor import (
    host,
    probes,
)
from lmscale_launcher.doctor import (
    host as clock,
)
from lmscale_launcher.doctor import (
    slurm_checks as slurm,
)
from lmscale_launcher.doctor.findings import Finding, fail, ok

_SAMPLE = 64 << 20


_LITTLE = 4 << 20  # where a sample would not fit


_MARKS = {"ok": " ok ", "warn": "warn", "fail": "FAIL"}


_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


Group = tuple[str, list[Finding]]


def doctor(*, cluster: str | None = None, as_json: bool = False, nodes: int = 0) -> int:
    """Look at this machine, and at a cluster by name; 78 if something fails.

    `nodes`: run the check of a node on so many nodes of the (Slurm) cluster, too.
    """
    section = _cluster(cluster) if cluster is not None else None
    if nodes and (section is None or not cluster_of(section.kind).can_check_nodes):
        raise UsageError("--nodes needs --cluster with a cluster of kind slurm")
    groups: list[Group] = []
    show = _Table(sys.stdout)
    for group in _groups(section, nodes):
        groups.append(group)
        if not as_json:
            show.group(group)
    findings = [one for _, found in groups for one in found]
    if as_json:
        body = [{"group": name, **asdict(one)} for name, found in groups for one in found]
        sys.stdout.write(json.dumps(body) + "\n")
    else:
        sys.stdout.write(f"\n{_conclusion(findings, section)}\n")
    bad = any(one.level == "fail" for one in findings)
    return int(ExitCode.CONFIG if bad else ExitCode.DONE)


def _cluster(name: str) -> ClusterConfig:
    from lmscale.config.run_file import configs_dir, load

    # Beside a run file comes first, as for `submit`: here, the current folder.
    own = Path.cwd() / f"{name}.yaml"
    name = str(own) if own.is_file() else name
    # Any run will do: only its section about the cluster is looked at.
    return load(configs_dir() / "runs" / "smoke.yaml", [f"cluster={name}"]).cluster


def _groups(section: ClusterConfig | None, nodes: int) -> Iterator[Group]:
    env = os.environ
    tool = cluster_of(section.kind).tool if section else None
    several = section is not None and section.nodes > 1
    asked = probes.Probes(env)  # torch takes seconds: it is asked first and answers later
    asked_gpus, asked_name = nvidia.start_query(), host.start_name_lookup()
    yield "this machine", _machine(host.host_name(asked_name.answer(), env, several=several))
    driver = nvidia.read(asked_gpus.answer())
    in_torch, facts = asked.torch()
    yield "torch", [*in_torch, *asked.gloo()]
    yield "GPUs", _gpus(driver, facts, env, section)
    yield "deepspeed", asked.deepspeed()
    yield "mpi", probes.mpi(env, wanted=tool == "mpi")
    yield "slurm", slurm.check(env, section if tool == "slurm" else None)
    on_disk, offset = _storage(several)
    yield "storage", on_disk
    yield "clock", [*offset, clock.keeper()]
    if nodes and section is not None:
        from lmscale_launcher.doctor.slurm_checks import check_nodes

        yield "nodes", check_nodes(section, nodes=nodes, folder=_run_parent())


def _machine(name: Finding) -> list[Finding]:
    found = [ok("lmscale", f"{__version__}, {Path(__file__).parents[2]}")]
    python = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036 a wheel forced onto an older one says so here
        found.append(fail("python", python, "lmscale needs Python 3.11 or newer"))
    else:
        found.append(ok("python", python))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.append(
        ok("system", f"{platform.system()} {platform.release()}, {show_bytes(memory)} of memory")
    )
    parts = [host.cores(0), name, host.open_files(), host.locked_memory()]
    parts += [host.shared_memory(1, gpus=False), host.leftovers()]
    return [*found, *(part for part in parts if part is not None)]


def _gpus(
    driver: nvidia.Driver,
    facts: Mapping[str, object],
    env: Mapping[str, str],
    section: ClusterConfig | None,
) -> list[Finding]:
    ranks = 1
    if section is not None and cluster_of(section.kind).nodes_are_like_this_host:
        ranks = section.ranks_per_node or 1
    found = nvidia.check(driver, env, ranks=ranks)
    if driver.gpus:
        names = ", ".join(sorted({gpu.name for gpu in driver.gpus}))
        found.append(ok("driver", f"{driver.gpus[0].driver}: {names}"))
    return found + probes.gpus(driver, facts, env)


def _run_parent() -> Path:
    """Where run folders are made by default: runs/ of the current folder, or that folder."""
    here = Path.cwd()
    return here / "runs" if (here / "runs").is_dir() else here


def _storage(several: bool) -> tuple[list[Finding], list[Finding]]:
    runs, scratch = _run_parent(), Path(os.environ.get("TMPDIR") or "/tmp")
    found: list[Finding] = []
    offset: list[Finding] = []
    for what, folder in (("runs", runs), ("scratch", scratch)):
        answer = storage.start_touch(folder, size=4096).answer()
        written = storage.writable(what, folder, answer)
        if written.level != "ok":
            found.append(written)
            continue
        mount = storage.mount_of(folder)
        if what == "runs":
            found.append(storage.kind(what, folder, mount, several_nodes=several))
            skew = storage.clock_offset("file server", answer, where=str(folder))
            offset += [skew] if skew else []
        locked = storage.locks("locks", folder, answer, mount) if what == "runs" else None
        size = _SAMPLE if shutil.disk_usage(folder).free > 2 * _SAMPLE else _LITTLE
        sample = storage.start_touch(folder, size=size, timeout_s=60.0).answer()
        speed = storage.rate("speed", folder, sample, size=size)
        room = storage.free_space("free space", folder, warn_below=10 << 30)
        found += [one for one in (room, speed, locked) if one is not None]
    return found, offset


class _Table:
    """Groups of lines, wrapped to the terminal; whole lines where a program reads them."""

    def __init__(self, stream: object) -> None:
        self._on_screen = bool(getattr(stream, "isatty", lambda: False)())
        self._width = shutil.get_terminal_size().columns if self._on_screen else 10_000
        self._coloured = self._on_screen and "NO_COLOR" not in os.environ

    def group(self, group: Group) -> None:
        """Print one group."""
        name, findings = group
        sys.stdout.write(f"{name}\n")
        for one in findings:
            mark = _MARKS[one.level]
            if self._coloured:
                mark = f"\033[{_COLOURS[one.level]}m{mark}\033[0m"
            sys.stdout.write(f"  {mark}  {one.what:<16}  {self._wrapped(one.fact)}\n")
            if one.hint:
                sys.stdout.write(f"{' ' * 26}-> {self._wrapped(one.hint, more=3)}\n")
        sys.stdout.flush()

    def _wrapped(self, text: str, more: int = 0) -> str:
        room = max(30, self._width - 26 - more)
        lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)
        return f"\n{' ' * (26 + more)}".join(lines)


def _conclusion(findings: list[Finding], section: ClusterConfig | None) -> str:
    bad = [one.what for one in findings if one.level == "fail"]
    odd = [one.what for one in findings if one.level == "warn"]
    where = f"a cluster of kind {section.kind}" if section else "this machine"
    worth = f"; worth a look: {', '.join(odd)}" if odd else ""
    if bad:
        return f"{where} cannot run everything: {', '.join(bad)} fail{'s' if len(bad) == 1 else ''}{worth}"
    return f"{where} can train: nothing fails{worth}"
