"""RUN/bad-nodes: hosts that the next start of the run excludes. One file per host; its text is the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmscale.base.fs import UnsuitableFile, atomic_write, read_text, storage_errors
from lmscale.run_folder.paths import RunFolder

_NO_REASON = "no reason given"


@dataclass(frozen=True, slots=True)
class BadNode:
    """A host that failed its check, or whose copies of the weights drifted."""

    host: str
    why: str  # the first line of its file
    path: Path
    written_ns: int


def read_bad_nodes(folder: RunFolder) -> list[BadNode]:
    """The bad nodes, by host name. A file may vanish meanwhile; an unreadable one still names its host."""
    found = []
    for path in sorted(folder.bad_nodes.glob("[!.]*")):  # .nfs0001 is a file of NFS
        try:
            written_ns = path.stat().st_mtime_ns
            why = next(iter(read_text(path).strip().splitlines()), _NO_REASON)
        except FileNotFoundError:
            continue
        except UnsuitableFile as error:
            written_ns, why = 0, str(error)
        except OSError as error:
            written_ns, why = 0, f"its file cannot be read: {error.strerror}"
        found.append(BadNode(path.name, why, path, written_ns))
    return found


def write_bad_nodes(folder: RunFolder, reasons: Mapping[str, str]) -> None:
    """Add hosts. Raises RetryableError (full disk) or ConfigError (permissions)."""
    for host, why in reasons.items():
        path = folder.bad_nodes / host.replace("/", "_")
        with storage_errors(f"writing {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, f"{why}\n".encode())
