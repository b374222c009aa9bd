"""Slurm as one kind of cluster: queue a job, ask how jobs stand, end them."""

import re
import shlex
import time
from collections.abc import Collection, Mapping, Sequence, Set
from typing import NamedTuple

from typing_extensions import override

from lmscale.base.errors import ConfigError, Problem, RetryableError
from lmscale.base.fs import atomic_write, storage_errors
from lmscale.base.proc import this_host
from lmscale.config.cluster_schema import ClusterConfig
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.base import Cluster, JobState, RankLauncher
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.slurm import preflight, states
from lmscale_launcher.slurm import query as answers
from lmscale_launcher.slurm import query as commands
from lmscale_launcher.slurm.query import QueueEntry, SlurmResult, SlurmUnavailable, Unreadable, ask
from lmscale_launcher.slurm.script import command, library, render

# KillWait, the time between Slurm's TERM and its KILL, is 30 s by default; then a node cleans up.
_END_S = 50.0
_LOOK_S, _LOOK_AT_MOST_S = 0.5, 8.0  # a controller serves all users of a site
_JSON_TIMEOUT_S = 20.0  # 22.05 lists all jobs of all users, whichever are asked for


class SlurmJob(NamedTuple):
    """A job in Slurm. Its number alone is not enough: it comes again after a crash of the controller."""

    id: str
    name: str  # empty: not known


class SlurmCluster(Cluster):
    """The queue that this machine's Slurm commands talk to."""

    # A controller serves all users of a site: its admins ask for at least 30 s between polls.
    poll_interval_s = 30.0
    stop_poll_interval_s = 10.0
    clock_skew_s = 5.0  # between a login node and a compute node
    confirms_job_end = True
    excludes_bad_nodes = True
    nodes_are_like_this_host = False
    can_check_nodes = True
    tool = "slurm"

    @override
    def runs_on_this_host_only(self, cluster: ClusterConfig) -> bool:
        return False

    @override
    def has_gpus_by_default(self, cluster: ClusterConfig) -> bool:
        return cluster.slurm.gpus == "none"  # nodes come whole

    @override
    def launch_mode(self, cluster: ClusterConfig) -> str | None:
        return cluster.slurm.launch

    @override
    def rank_launcher(self, cluster: ClusterConfig) -> RankLauncher | None:
        if cluster.slurm.launch == "node":
            return None
        return RankLauncher("cluster.slurm.launch=rank", "cluster.slurm.launch=node")

    @override
    def preview(self, plan: JobPlan) -> str:
        """The script, with the command that queues it as its last line: still a script, for shellcheck."""
        where = f"cd {shlex.quote(str(plan.workdir))} && "
        return f"{_script(plan)}# queued by: {where}{shlex.join(command(plan))}\n"

    @override
    def submit(self, plan: JobPlan) -> JobRecord:
        """Check, queue, and look whether it can ever start. Raises ConfigError, RetryableError."""
        with storage_errors(f"writing {plan.script}"):
            for path in (plan.log, plan.script):
                path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(plan.library, library().encode())
            atomic_write(plan.script, _script(plan).encode())
        answer = commands.sbatch(preflight.check(plan), cwd=plan.workdir)
        if answer.code != 0:
            raise preflight.refusal(answer, plan, preflight.look())
        job = _job_id(answer)
        seen = preflight.watch(job, plan)
        facts = {"name": seen.name if seen else "", "said": answer.err.strip()}
        return JobRecord(
            number=plan.number, kind="slurm", job=job, host=this_host(), time=time.time(),
            nodes=plan.nodes, min_nodes=plan.min_nodes, ranks_per_node=plan.ranks_per_node,
            facts={key: text for key, text in facts.items() if text},
        )  # fmt: skip

    @override
    def states(self, jobs: Sequence[tuple[RunFolder, JobRecord]]) -> list[JobState]:
        """One state a job: squeue for all of them, and only for those it no longer lists sacct, then scontrol."""
        chains = [_chain(folder, record) for folder, record in jobs]
        known, silent = _standing({job for chain in chains for job in chain})
        # A job that has just ended may have queued another after its list was read.
        longer = [_chain(folder, record) for folder, record in jobs]
        if new := {job for chain in longer for job in chain} - {
            job for chain in chains for job in chain
        }:
            more, quiet = _standing(new)
            chains, known, silent = longer, known | more, silent or quiet
        return [
            states.of_chain([known.get(job) or _unknown(job, silent) for job in chain])
            for chain in chains
        ]

    @override
    def cancel(self, folder: RunFolder, record: JobRecord) -> None:
        """End it and its follow-ups. Raises RetryableError where Slurm has not ended it within 50 s."""
        chain = _chain(folder, record)
        deadline, pause_s = time.monotonic() + _END_S, _LOOK_S
        while True:
            alive = _alive(chain)
            if not alive:
                return
            _end(alive)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LOOK_AT_MOST_S)
            chain = _chain(folder, record)  # its script may just have queued another
            if time.monotonic() > deadline:
                break
        left = "; ".join(
            f"job {job.id} is {state.raw or state.standing}" for job, state in alive.items()
        )
        raise RetryableError(
            f"Slurm was asked to cancel, but {left}\n"
            f"  hint: look again in a minute: squeue -j {','.join(job.id for job in alive)}"
        )

    @override
    def withdraw(self, folder: RunFolder, record: JobRecord) -> bool:
        """Take what waits out of the queue; whether there was anything."""
        alive = _alive(_chain(folder, record))
        waiting = [job for job, state in alive.items() if state.standing == "pending"]
        if not waiting:
            return False
        # --state: one that has started meanwhile goes on, to see RUN/stop and to save.
        _scancel("--state=PENDING", *(job.id for job in waiting))
        time.sleep(_LOOK_S)
        left = _alive(waiting)
        return not all(job in left for job in waiting)


def _script(plan: JobPlan) -> str:
    text = render(plan)
    return text if text.endswith("\n") else f"{text}\n"


def _job_id(answer: SlurmResult) -> str:
    """`17`, or `17;cluster`; a site's wrapper may say more before it."""
    for line in reversed(answer.out.splitlines()):
        if match := re.fullmatch(r"(\d+)(?:;\S*)?", line.strip()):
            return match[1]
    raise RetryableError(
        f"sbatch named no job: {answer.words}\n  hint: look whether one was queued: squeue --me"
    )


def _chain(folder: RunFolder, record: JobRecord) -> list[SlurmJob]:
    """The job and the follow-ups that its script has queued, oldest first."""
    path = folder.jobs / f"{record.number}.chain"
    try:
        listed = path.read_text().split()
    except FileNotFoundError:
        listed = []
    ids = dict.fromkeys([record.job, *(job for job in listed if job.isdecimal())])
    return [SlurmJob(job, str(record.facts.get("name", ""))) for job in ids]


def _unknown(job: SlurmJob, silent: str) -> JobState:
    if silent:
        return JobState("unknown", silent)
    return JobState("unknown", f"Slurm no longer knows job {job.id}", raw="FORGOTTEN")


def _standing(jobs: Set[SlurmJob]) -> tuple[dict[SlurmJob, JobState], str]:
    """What is known of these jobs; and why nothing is known of the others, where Slurm does not answer."""
    known: dict[SlurmJob, JobState] = {}
    if not jobs:
        return known, ""
    try:
        commands.ping()  # 10 ms; squeue needs 9 s to find out that nobody answers
        for source in (_squeue, _sacct, _scontrol):
            missing = jobs - known.keys()
            if not missing:
                break
            groups = states.by_job(source(sorted({job.id for job in missing})))
            for job in missing:
                state = states.find(job.id, groups, name=job.name)
                # Accounting may be behind, or have lost the end: it only knows of jobs that have ended.
                if state and (source is not _sacct or state.standing == "ended"):
                    known[job] = state
    except ConfigError as error:
        return known, error.problems[0].fact
    except (SlurmUnavailable, Unreadable) as error:
        return known, str(error).partition("\n")[0]
    return known, ""


def _squeue(jobs: Sequence[str]) -> list[QueueEntry]:
    listed = ",".join(jobs)
    try:
        answer = ask("squeue", "--json", "-t", "all", "-j", listed, timeout_s=_JSON_TIMEOUT_S)
        if _forgotten(answer):
            return []
        if answer.code == 0:
            return answers.read_squeue_json(answer.out)
    except (SlurmUnavailable, Unreadable):
        # Too many jobs to list in time, or a shape not known yet. With the controller down 22.05 says so
        # here; then the next question says it again.
        pass
    answer = ask("squeue", "-h", "-t", "all", "-j", listed, "-o", answers.SQUEUE_FORMAT)
    if _forgotten(answer):
        return []
    if answer.code != 0:
        raise Unreadable(f"squeue: {answer.words}")
    return answers.read_squeue(answer.out)


def _sacct(jobs: Sequence[str]) -> list[QueueEntry]:
    """Nothing where there is no accounting, or where it does not answer: it only adds to what is known."""
    try:
        answer = ask(
            "sacct", "-D", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", answers.SACCT_FIELDS
        )
        return answers.read_sacct(answer.out) if answer.code == 0 else []
    except (SlurmUnavailable, ConfigError, Unreadable):
        return []


def _scontrol(jobs: Sequence[str]) -> list[QueueEntry]:
    """It takes one job a call, so many are found among all."""
    answer = ask("scontrol", "-a", "show", "job", "-o", *(jobs if len(jobs) == 1 else ()))
    if answer.code != 0 and not _forgotten(answer):
        raise Unreadable(f"scontrol: {answer.words}")
    return answers.read_scontrol(answer.out)


def _forgotten(answer: SlurmResult) -> bool:
    """The controller answers that it has no such job."""
    return answer.code != 0 and "Invalid job id" in answer.err


def _alive(jobs: Collection[SlurmJob]) -> dict[SlurmJob, JobState]:
    """Those of the jobs that wait or run. Raises where Slurm does not answer: they may all be."""
    known, silent = _standing(set(jobs))
    if silent:
        raise SlurmUnavailable(f"{silent}\n  hint: try again when `scontrol ping` says UP")
    return {job: known[job] for job in known if known[job].standing in ("running", "pending")}


def _end(alive: Mapping[SlurmJob, JobState]) -> None:
    """Their steps first, by SIGKILL: a job that is cancelled gives its steps KillWait (30 s) to end.

    Once a job is COMPLETING its steps can no longer be signalled, hence this order.
    """
    running = [job.id for job, state in alive.items() if state.raw == "RUNNING"]
    if running and (steps := _steps(running)):
        ask("scancel", "--signal=KILL", *steps)
    waiting = [job.id for job, state in alive.items() if state.raw != "COMPLETING"]
    if waiting:
        _scancel(*waiting)


def _steps(running: Sequence[str]) -> list[str]:
    """17.0 and its like. A script that has just begun has no step yet, but may have one in a moment."""
    for pause_s in (0.5, 1.0, 0.0):
        listed = ask("squeue", "-h", "-s", "-j", ",".join(running), "-o", "%i").out.split()
        if steps := [step for step in listed if re.fullmatch(r"\d+\.\d+", step)]:
            return steps
        time.sleep(pause_s)
    return []


def _scancel(*argv: str) -> None:
    answer = ask("scancel", *argv)
    if "denied" in answer.err:
        fact = f"job {argv[-1]} belongs to another user ({answer.words})"
        raise ConfigError([Problem("", fact, "its owner, or an administrator, can end it")])
