"""Future: the answer to a question that waits to be asked together with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Future(Generic[T]):
    """A result to come; asking for it runs what is waiting."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._found: list[T] = []
        self._readers: list[Callable[[T], None]] = []
        self._fault: Exception | None = None
        self.done = False

    @classmethod
    def failed(cls, fault: Exception) -> Future[T]:
        """A future whose result is an error."""
        future: Future[T] = cls(lambda: None)
        future.done, future._fault = True, fault
        return future

    def result(self) -> T:
        if not self.done:
            self._run()
        if self._fault is not None:
            raise self._fault
        assert self.done, "asked for while the questions that it waits with are being answered"
        assert self._found, "this result was read as it came, and not kept"
        return self._found[0]

    def read(self, of: Callable[[T], R]) -> Future[R]:
        """What `of` makes of the result as it comes. The result itself is not kept then."""
        read: Future[R] = Future(self._run)
        if self._fault is not None:
            return Future.failed(self._fault)
        if self.done:
            read.set(of(self.result()))
        else:
            self._readers.append(lambda value: read.set(of(value)))
        return read

    def set(self, value: T) -> None:
        self.done = True
        for reader in self._readers:
            reader(value)
        if not self._readers:
            self._found = [value]
