"""How the verbs treat Ctrl-C, and a reader of standard output that ends early, as `head` does."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ends_quietly() -> Iterator[None]:
    """End the block without a message at Ctrl-C, or when the reader of standard output has closed it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # The interpreter flushes once more at its end, which needs an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def uninterrupted(explain: Callable[[], None]) -> Iterator[None]:
    """Run the block to its end; a Ctrl-C meanwhile only calls `explain`."""
    before = signal.signal(signal.SIGINT, lambda *_: explain())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def exits_on_interrupt(explain: Callable[[], None]) -> Iterator[None]:
    """At Ctrl-C call `explain` and exit with 130."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        explain()
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGINT, before)
