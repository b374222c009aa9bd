"""A cache that drops what was used least recently."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key, up to a total cost. One thread at a time.

    The cost of a value is 1, so that `capacity` is a number of entries, or what `cost` returns for it,
    such as its bytes.
    """

    def __init__(
        self,
        capacity: int,
        *,
        cost: Callable[[V], int] = lambda _: 1,
        on_drop: Callable[[V], None] | None = None,
    ) -> None:
        """`on_drop` is called for each value that leaves the cache, for instance to close it."""
        self._capacity = capacity
        self._cost = cost
        self._on_drop = on_drop
        self._values: OrderedDict[K, V] = OrderedDict()
        self._used = 0

    @property
    def used(self) -> int:
        """The total cost of all values."""
        return self._used

    def values(self) -> list[V]:
        """All values, the least recently used one first."""
        return list(self._values.values())

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used one; None where there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Store a value after making room for it. A value above the capacity is not stored."""
        cost = self._cost(value)
        if cost > self._capacity:
            return
        self.pop(key)
        self.make_room(cost)
        self._values[key] = value
        self._used += cost

    def make_room(self, cost: int) -> None:
        """Drop the least recently used values until `cost` fits, or none is left."""
        while self._values and self._used + cost > self._capacity:
            self.pop(next(iter(self._values)))

    def pop(self, key: K) -> None:
        """Drop a value; a missing one is not an error."""
        value = self._values.pop(key, None)
        if value is None:
            return
        self._used -= self._cost(value)
        if self._on_drop is not None:
            self._on_drop(value)

    def clear(self) -> None:
        """Drop all values."""
        while self._values:
            self.pop(next(iter(self._values)))
