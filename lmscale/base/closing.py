"""Objects that own a file, a thread or a writer, and are closed at the end of a `with` block."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """A context manager whose block ends with `close`, whether an exception was raised or not."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Release what the object owns; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
