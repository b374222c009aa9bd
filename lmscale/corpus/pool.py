"""A few threads that work through what they are handed, until it is done, one fails, or somebody stops them."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

_POLL_S = 0.1
_PATIENCE_S = (
    2.0  # for a thread that hangs in a read of a dead file system: it dies with the process
)

Work = Callable[[int], bool]  # False: nothing more can be done, without that being an error
Tick = Callable[[], None]


class Pool:
    """Hand over lists of items; each list is one thread's. Leaving the context ends the threads."""

    def __init__(self, worker: Callable[[], Work], stop: threading.Event, *, threads: int) -> None:
        """`worker` is called once in each thread, for what must not be shared."""
        self._worker = worker
        self._stop = stop
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self._queue: queue.Queue[list[int] | None] = queue.Queue(maxsize=2 * threads)
        self._threads = [
            threading.Thread(target=self._run, name=f"stage-{number}", daemon=True)
            for number in range(threads)
        ]

    def work(self, lists: Iterable[list[int]], tick: Tick) -> None:
        """All of it, or as far as it goes; `tick` is called often. Raises what a thread raised."""
        for items in itertools.chain(lists, [None] * len(self._threads)):
            while not self._over():
                tick()
                try:
                    self._queue.put(items, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            if self._over():
                break
        while not self._over() and any(thread.is_alive() for thread in self._threads):
            tick()
            for thread in self._threads:
                thread.join(_POLL_S / len(self._threads))
        if self._errors:
            raise self._errors[0]
        tick()

    def _over(self) -> bool:
        return self._stop.is_set() or self._ended.is_set()

    def _run(self) -> None:
        try:
            work = self._worker()
            while not self._over():
                try:
                    items = self._queue.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if items is None:
                    return
                for item in items:
                    if self._over():
                        return
                    if not work(item):
                        self._ended.set()
        except BaseException as error:  # handed to the caller, who raises it
            self._errors.append(error)
            self._ended.set()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(_PATIENCE_S / len(self._threads))
