"""`lmscale stop RUN`: ask a run to save and stop, and keep everything from starting it again."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lmscale.errors import ConfigError, ExitCode, Problem
from lmscale.run.durable import storage_errors
from lmscale.run.events import events_path
from lmscale.run.folder import RunFolder
from lmscale.run.lines import readable_lines
from lmscale.run.liveness import STALE_S, Live, live
from lmscale.run.processes import is_alive, started_ticks

_POLL_S = 0.1
_REMIND_S = 10.0


def stop(run: str, *, now: bool, say: Callable[[str], None]) -> int:
    """Write RUN/stop, signal the run's supervisor and wait until it has ended."""
    folder = find_run_folder(run)
    with storage_errors(f"writing {folder.stop}"):
        folder.stop.touch()
    found = live(folder)
    if found is None:
        say(f"{folder.path} is not running; nothing starts it again but `lmscale train` by hand")
        return ExitCode.DONE
    if found.here:
        try:
            os.kill(found.pid, signal.SIGKILL if now else signal.SIGTERM)
        except PermissionError as error:
            fact = f"pid {found.pid} belongs to another user"
            raise ConfigError([Problem("", fact, "its owner can stop it")]) from error
        except ProcessLookupError:
            pass  # it has ended by itself
        _wait(folder, found, now=now, say=say)
    else:
        if now:
            say(f"it runs on {found.host}: only `lmscale stop --now` on that host can kill it")
        say(f"asked the run on {found.host} to save and stop through {folder.stop}")
        _wait(folder, found, now=False, say=say)
    say(_what_happened(folder, found, now=now and found.here))
    return ExitCode.DONE


def find_run_folder(run: str) -> RunFolder:
    """The run folder that a user means: its path, or its name in runs/."""
    for path in (Path(run), Path("runs") / run):
        folder = RunFolder(path.absolute())
        if folder.events.is_dir() or folder.config.is_file():
            return folder
    hint = "give the folder that holds config.yaml and events/ (train.run_dir)"
    raise ConfigError([Problem("", f"{run} is no run folder, and neither is runs/{run}", hint)])


def _wait(folder: RunFolder, found: Live, *, now: bool, say: Callable[[str], None]) -> None:
    ticks, told_at = started_ticks(found.pid), time.monotonic()
    if not now:
        say(f"pid {found.pid} on {found.host} is saving and stopping")
    while _still_runs(folder, found, ticks):
        time.sleep(_POLL_S)
        if time.monotonic() - told_at > _REMIND_S:
            told_at = time.monotonic()
            say("still waiting; to end it without saving: lmscale stop --now")


def _still_runs(folder: RunFolder, found: Live, ticks: int | None) -> bool:
    if found.here:
        return ticks is not None and is_alive(found.pid, ticks)
    current = live(folder)
    return current is not None and current.host == found.host and current.age_s < STALE_S


def _what_happened(folder: RunFolder, found: Live, *, now: bool) -> str:
    saved = exited = None
    for event in readable_lines(events_path(folder, found.start)):
        if event["kind"] == "save":
            saved = event["step"]
        if event["kind"] == "exit" and event["pid"] == found.pid:
            exited = event
    stands = (
        f"newest checkpoint of this start: step {saved}"
        if saved is not None
        else "no checkpoint was saved"
    )
    if now:
        return f"killed; {stands}"
    ended = f"it ended ({exited['reason']})" if exited else "it ended without a word"
    return f"{ended}; {stands}"
