"""One line on a terminal that says how far a long read is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from lmscale.base.units import show_bytes

_EVERY_S = 0.1


@contextmanager
def byte_line(what: str, stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (bytes done, bytes in all). Silent where nobody watches."""
    in_place, written_at = stream.isatty(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal written_at
        now = time.monotonic()
        if in_place and (now - written_at >= _EVERY_S or done >= total):
            written_at = now
            share = 100 * done // total if total else 100
            stream.write(f"\r\x1b[K{what}  {share}%  {show_bytes(done)} of {show_bytes(total)}")
            stream.flush()

    try:
        yield show
    finally:
        if in_place:
            stream.write("\r\x1b[K")
            stream.flush()
