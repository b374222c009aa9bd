"""The clusters' answers about many jobs: one query per kind of cluster, and not too often."""

import time
from collections.abc import Callable, Sequence

from lmscale.base.errors import LmscaleError
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.base import Cluster, JobState
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.run_facts import RunFacts, belongs, newest_start_of
from lmscale_launcher.jobs.run_state import is_final


class ClusterAnswers:
    """Asks clusters about the newest jobs of runs, and keeps their answers for a while."""

    def __init__(
        self,
        *,
        clusters: Callable[[str], Cluster] = cluster_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clusters = clusters
        self._clock = clock
        self._kept: dict[str, tuple[float, dict[object, JobState]]] = {}

    def of(self, found: Sequence[RunFacts]) -> list[JobState | None]:
        """One answer per run, in their order. None: the run has no job, or its end is known."""
        kinds: dict[str, list[tuple[RunFolder, JobRecord]]] = {}
        for facts in found:
            if facts.record is not None and not _settled(facts):
                kinds.setdefault(facts.record.kind, []).append((facts.folder, facts.record))
        states: dict[object, JobState] = {}
        for kind, jobs in kinds.items():
            states |= self._of_kind(kind, jobs)
        return [states.get(_key(facts.folder, facts.record)) for facts in found]

    def _of_kind(
        self, kind: str, jobs: Sequence[tuple[RunFolder, JobRecord]]
    ) -> dict[object, JobState]:
        now = self._clock()
        asked, known = self._kept.get(kind, (None, {}))
        if asked is None or now - asked >= self._clusters(kind).poll_interval_s:
            known = self._ask(kind, jobs)
            self._kept[kind] = (now, known)
        unasked = JobState("unknown", f"{kind} will be asked within half a minute")
        keys = [_key(*job) for job in jobs]
        return {key: known.get(key, unasked) for key in keys}

    def _ask(
        self, kind: str, jobs: Sequence[tuple[RunFolder, JobRecord]]
    ) -> dict[object, JobState]:
        try:
            states = self._clusters(kind).states(jobs)
        except (LmscaleError, OSError) as error:
            states = [JobState("unknown", f"{kind} did not answer: {error}")] * len(jobs)
        return {_key(*job): state for job, state in zip(jobs, states, strict=True)}


def _settled(facts: RunFacts) -> bool:
    """Whether the newest start of the newest job has ended for good, by its own word."""
    start = newest_start_of(facts.events)
    if facts.record is None or start is None or start.exit is None:
        return False
    over = facts.stop is not None or is_final(start.code)
    return over and belongs(start, facts.record)


def _key(folder: RunFolder, record: JobRecord | None) -> object:
    return folder.path, record.number if record is not None else None
