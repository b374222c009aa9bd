"""A JSON file with a digest of its own, so that no byte of it can change unseen.

The digest stands in the last line and covers all bytes before that line, so that it does not depend
on how a JSON library writes numbers, escapes or blanks.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from lmscale.corpus.publish import published
from lmscale.errors import DataError

_LAST_LINE = ' "digest": "{}"\n}}\n'
_LAST_LINE_BYTES = len(_LAST_LINE.format("0" * 64))


def write_sealed(path: Path, body: dict[str, Any]) -> str:
    """Publish `body` under `path`; returns its digest (SHA-256)."""
    covered = json.dumps(body, indent=1, sort_keys=True).removesuffix("\n}") + ",\n"
    digest = hashlib.sha256(covered.encode()).hexdigest()
    with published(path) as file:
        file.write((covered + _LAST_LINE.format(digest)).encode())
    return digest


def read_sealed(path: Path, *, restore: str) -> tuple[bytes, str]:
    """The JSON text and the digest of a file whose every byte has been checked.

    Raises DataError where it is missing, empty, unreadable or damaged; `restore` says what to do.
    """
    raw = _bytes(path, restore)
    covered, last = memoryview(raw)[:-_LAST_LINE_BYTES], raw[-_LAST_LINE_BYTES:]
    digest = hashlib.sha256(covered).hexdigest()
    if not covered or last != _LAST_LINE.format(digest).encode():
        raise DataError(
            f"{path}: its {len(raw)} bytes do not match the digest in its last line: "
            f"it is damaged; {restore}"
        )
    return raw, digest


def _bytes(path: Path, restore: str) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: damaged, or never finished; {restore}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {restore}") from error
    if not raw:
        raise DataError(f"{path} is empty: it is damaged; {restore}")
    return raw
