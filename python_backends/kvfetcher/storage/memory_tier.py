"""Copies of parts of objects in memory: bounded, least recently used objects go first."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfetcher.storage.spans import Span, cover, join

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class _Kept:
    """Parts of one object."""

    parts: dict[Span, bytes] = field(default_factory=dict)
    born: dict[Span, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.parts)

    def drop(self, span: Span) -> None:
        del self.parts[span], self.born[span]


class MemoryTier:
    """Parts of objects by name. Not thread-safe: one event loop.

    What a reader got stays its own: dropping an object takes nothing from it.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_age_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keeps nothing yet.

        Args:
            max_bytes: limit of all parts together.
            max_age_seconds: older parts are not served.
            clock: seconds, monotonic.
        """
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._objects: OrderedDict[str, _Kept] = OrderedDict()
        self.num_bytes = 0

    def get(self, name: str, start: int, end: int) -> bytes | None:
        """The answer of a store to a read of ``[start, end)``; None where it is not all here."""
        spans = self._cover(name, start, end)
        if spans is None:
            return None
        parts = self._objects[name].parts
        self._objects.move_to_end(name)
        return join([(span, parts[span]) for span in spans], start, end) if spans else b""

    def holds(self, name: str, start: int, end: int) -> bool:
        """Whether `get` would answer; does not count as a use."""
        return self._cover(name, start, end) is not None

    def add(self, name: str, span: Span, data: bytes) -> None:
        """Keep a part; what it covers goes. One that is larger than all of the tier is not kept."""
        if span.num_bytes > self._max_bytes:
            return
        kept = self._objects.setdefault(name, _Kept())
        self._objects.move_to_end(name)
        for old in [s for s in kept.parts if span.start <= s.start and s.stop <= span.stop]:
            self.num_bytes -= old.num_bytes
            kept.drop(old)
        kept.parts[span] = data
        kept.born[span] = self._clock()
        self.num_bytes += span.num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._objects.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def names(self) -> list[str]:
        """Names of the objects of which it keeps parts."""
        return sorted(self._objects)

    def drop(self, name: str) -> None:
        """Forget an object."""
        if (kept := self._objects.pop(name, None)) is not None:
            self.num_bytes -= kept.num_bytes

    def _cover(self, name: str, start: int, end: int) -> list[Span] | None:
        """The parts that hold a read's answer; parts that are too old go first."""
        kept = self._objects.get(name)
        if kept is None:
            return None
        oldest = self._clock() - self._max_age_seconds
        for span in [span for span, born in kept.born.items() if born < oldest]:
            self.num_bytes -= span.num_bytes
            kept.drop(span)
        return cover(kept.parts, start, end)
