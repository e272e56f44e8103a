"""Who runs next: pure functions and one bounded queue. No threads, no torch."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from kvfetcher.errors import EngineBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


def slice_end(position: int, prompt_tokens: int, slice_tokens: int) -> int:
    """Where the prefill slice that begins at `position` ends (exclusive).

    Slices end at absolute multiples of `slice_tokens`, wherever the request began to compute.
    A prefix hit that ends at such a multiple therefore leaves the very slices, and the very
    matrix shapes, that computing from zero runs: the results are equal bit for bit.
    """
    return min(prompt_tokens, (position // slice_tokens + 1) * slice_tokens)


class WaitingLine(Generic[T]):
    """First come, first served, bounded. Not thread-safe."""

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    def check_room(self, running: int) -> None:
        """Raise EngineBusyError unless one more request may come."""
        free = max(0, self._max_running - running)
        if len(self._waiting) >= self._max_waiting + free:
            raise EngineBusyError(
                f"{running} requests run and {len(self._waiting)} wait, which is all that"
                " engine.max_running_requests and engine.max_waiting_requests allow; try again"
                " later"
            )

    def add(self, item: T) -> None:
        self._waiting.append(item)

    def remove(self, item: T) -> None:
        self._waiting.remove(item)

    def admit(self, running: int) -> list[T]:
        """Take out those that may run now."""
        number = min(len(self._waiting), max(0, self._max_running - running))
        return [self._waiting.popleft() for _ in range(number)]

    def clear(self) -> list[T]:
        """Take out all."""
        items = list(self._waiting)
        self._waiting.clear()
        return items
