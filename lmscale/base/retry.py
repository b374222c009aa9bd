"""Repeating an operation that may fail for a moment: one loop for every storage backend."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

X = TypeVar("X")


def retry(
    operation: Callable[[], X],
    *,
    waits_s: Iterable[float],
    is_transient: Callable[[Exception], bool],
    before_retry: Callable[[Exception], None] | None = None,
) -> X:
    """The result of `operation`, which is called once and then again after each of `waits_s` seconds.

    An exception that is not transient is raised at once, and the last transient one when no wait is
    left. `before_retry` is called with the exception before each wait. The waits may be a generator,
    for random ones: no more are drawn than are needed.
    """
    waits = iter(waits_s)
    while True:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            wait_s = next(waits, None)
            if wait_s is None:
                raise
            if before_retry is not None:
                before_retry(error)
        time.sleep(wait_s)
