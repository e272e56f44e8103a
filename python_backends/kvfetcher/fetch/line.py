"""Places for requests that fetch, handed out in the order of `fetch/planning/order.py`. One event loop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

from kvfetcher.fetch.planning.order import Waiting, charge, next_requests

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Line:
    """At most `num_places` are taken at one time.

    Args:
        num_places: fetches that run at one time.
        max_waiting: that should wait at one time; see `is_full`.
        ageing: see `order.next_requests`.
        clock: seconds, monotonic.
    """

    def __init__(
        self, *, num_places: int, max_waiting: int, ageing: float, clock: Callable[[], float]
    ) -> None:
        self._num_places = num_places
        self._max_waiting = max_waiting
        self._ageing = ageing
        self._clock = clock
        self._numbers = count()
        self._waiting: dict[int, tuple[Waiting, asyncio.Event]] = {}
        self._fetching: dict[int, str] = {}
        self._served: dict[str, float] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether one more had better not wait; nobody is turned away here."""
        has_place = len(self._fetching) < self._num_places
        return not has_place and len(self._waiting) >= self._max_waiting

    @asynccontextmanager
    async def place(self, tenant: str, *, fetch_seconds: float) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Args:
            tenant: whose request it is.
            fetch_seconds: predicted length of the fetch, alone.
        """
        number = next(self._numbers)
        entry = Waiting(number, tenant, self._clock(), fetch_seconds)
        turn = asyncio.Event()
        self._waiting[number] = entry, turn
        try:
            self._advance()
            await turn.wait()
            yield
        finally:
            self._waiting.pop(number, None)
            self._fetching.pop(number, None)
            self._advance()

    def _advance(self) -> None:
        free = self._num_places - len(self._fetching)
        if free < 1 or not self._waiting:
            return
        chosen = next_requests(
            [entry for entry, _ in self._waiting.values()],
            now=self._clock(),
            num_places=free,
            served_seconds=self._served,
            ageing=self._ageing,
        )
        for entry in chosen:
            active = [*self._fetching.values(), *(w.tenant for w, _ in self._waiting.values())]
            self._served = charge(self._served, entry, active)
            _, turn = self._waiting.pop(entry.request_id)
            self._fetching[entry.request_id] = entry.tenant
            turn.set()
