"""How often a run was started again without getting anywhere."""

from collections.abc import Iterable, Mapping
from typing import Any


def starts_since_progress(events: Iterable[Mapping[str, Any]]) -> int:
    """Restarts since the newest checkpoint moved: what `cluster.max_restarts` limits.

    Counted over all starts, whoever made them (supervisor, scheduler, JobSet). The first start and a
    start that a person asked for (by hand, or `fresh`: the first one of a submission) are no
    restarts and begin a new count. A save is progress when its step is
    beyond every one before it: a run that falls back and saves the same steps again must end too.
    """
    restarts = -1
    highest = -1
    seen: set[str] = set()
    for event in events:
        if event["kind"] == "start" and event["start"] not in seen:
            seen.add(event["start"])  # the supervisor and rank 0 may both report one start
            if event.get("by_hand") or event.get("fresh"):
                restarts, highest = 0, -1
            else:
                restarts += 1
        elif event["kind"] == "save" and event["step"] > highest:
            restarts, highest = 0, event["step"]
    return max(restarts, 0)
