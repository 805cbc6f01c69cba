"""`Latest`: remembers the latest answers of all adapters, a bounded number of them.

Where there are too many, the adapter that has the most of them forgets its oldest one: a busy one does not push out the
answers of others.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Latest(Generic[Kept]):
    """Remembers something of each of the latest `most` answers, by their ids; None stands for the base."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._adapters: dict[str, str | None] = {}
        self._of: dict[str | None, OrderedDict[str, Kept]] = {}

    def remember(self, answer: str, adapter: str | None, kept: Kept) -> None:
        """Remember an answer of an adapter as its latest one."""
        self.forget(answer)
        self._adapters[answer] = adapter
        self._of.setdefault(adapter, OrderedDict())[answer] = kept
        while len(self._adapters) > self._most:
            busiest = max(self._of.values(), key=len)
            self.forget(next(iter(busiest)))

    def get(self, answer: str) -> Kept | None:
        """Return what is known of an answer; None if it is unknown or forgotten."""
        return self._of[self._adapters[answer]][answer] if answer in self._adapters else None

    def forget(self, answer: str) -> None:
        """Forget an answer, if it is remembered."""
        if answer in self._adapters:
            del self._of[self._adapters.pop(answer)][answer]

    def oldest(self) -> Iterator[tuple[str, Kept]]:
        """Yield the oldest answer of each adapter."""
        yield from [next(iter(of.items())) for of in self._of.values() if of]
