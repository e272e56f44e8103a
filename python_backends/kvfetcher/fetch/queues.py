"""Bounded, fair waiting: for a fetch, for bytes in memory, for a read, for a unit's stages.

Each of these is used on one event loop, loses nothing when whoever waits is cancelled, and has no
limit on how long somebody waits: that is the caller's.
"""

from __future__ import annotations

import asyncio
import heapq
from abc import ABC, abstractmethod
from collections import deque
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

from kvfetcher.fetch.planning.order import Waiting, charge, next_requests

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kvfetcher.fetch.planning.bandwidth import LinkEstimate

Priority = tuple[int, ...]
"""Smaller goes first; of equals, the one that came first."""

# While one arrives, the next one's request is on its way.
_MIN_READS = 2
# What a busy event loop may take to ask for the next read.
_DELAY_SECONDS = 0.005


class FetchQueue:
    """Requests that wait to fetch: at most `num_slots` fetch at one time, in the order of `planning.order`.

    Args:
        num_slots: fetches that run at one time.
        max_waiting: that should wait at one time; see `is_full`.
        ageing: see `order.next_requests`.
        clock: seconds, monotonic.
    """

    def __init__(
        self, *, num_slots: int, max_waiting: int, ageing: float, clock: Callable[[], float]
    ) -> None:
        self._num_slots = num_slots
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
        """Whether one more should not wait; callers turn it away, not this queue."""
        has_slot = len(self._fetching) < self._num_slots
        return not has_slot and len(self._waiting) >= self._max_waiting

    @asynccontextmanager
    async def slot(self, tenant: str, *, fetch_seconds: float) -> AsyncIterator[None]:
        """Wait for a slot and hold it.

        Args:
            tenant: whose request it is.
            fetch_seconds: predicted length of the fetch, alone.
        """
        number = next(self._numbers)
        entry = Waiting(number, tenant, self._clock(), fetch_seconds)
        granted = asyncio.Event()
        self._waiting[number] = entry, granted
        try:
            self._advance()
            await granted.wait()
            yield
        finally:
            self._waiting.pop(number, None)
            self._fetching.pop(number, None)
            self._advance()

    def _advance(self) -> None:
        free = self._num_slots - len(self._fetching)
        if free < 1 or not self._waiting:
            return
        chosen = next_requests(
            [entry for entry, _ in self._waiting.values()],
            now=self._clock(),
            num_slots=free,
            served_seconds=self._served,
            ageing=self._ageing,
        )
        for entry in chosen:
            active = [*self._fetching.values(), *(w.tenant for w, _ in self._waiting.values())]
            self._served = charge(self._served, entry, active)
            _, granted = self._waiting.pop(entry.request_id)
            self._fetching[entry.request_id] = entry.tenant
            granted.set()


class PrioritySlots:
    """At most `num_slots` are held at one time; the smallest priority gets the next one."""

    def __init__(self, num_slots: int) -> None:
        self._free = num_slots
        self._numbers = count()
        self._waiting: list[tuple[Priority, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def hold(self, priority: Priority) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        if self._free:
            self._free -= 1
        else:
            granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._numbers), granted))
            try:
                await granted
            except asyncio.CancelledError:
                if granted.done() and not granted.cancelled():  # granted to one that leaves
                    self._give()
                raise
        try:
            yield
        finally:
            self._give()

    def _give(self) -> None:
        while self._waiting:
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():  # else its waiter was cancelled
                granted.set_result(None)
                return
        self._free += 1


class _ByteQueue(ABC):
    """Bytes held at one time, given out in order of arrival; a subclass says what fits."""

    def __init__(self) -> None:
        self._num_holders = 0
        self._num_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._waiting_last: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_holders(self) -> int:
        return self._num_holders

    @property
    def used_bytes(self) -> int:
        return self._num_bytes

    async def take(self, num_bytes: int, *, last: bool = False) -> None:
        """Wait for space, behind all that came before; obliges to `give` the same number.

        Args:
            num_bytes: how many.
            last: let those pass, too, that come later and do not ask to be last.
        """
        queue = self._waiting_last if last else self._waiting
        if not queue and not (last and self._waiting) and self._fits(num_bytes):
            self._hold(num_bytes)
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append((num_bytes, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted, but nobody is there to use it
                self.give(num_bytes)
            else:
                self._grant()
            raise

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        self._num_holders -= 1
        self._num_bytes -= num_bytes
        self._grant()

    @asynccontextmanager
    async def hold(self, num_bytes: int, *, last: bool = False) -> AsyncIterator[None]:
        """`take`, and `give` at the end."""
        await self.take(num_bytes, last=last)
        try:
            yield
        finally:
            self.give(num_bytes)

    @abstractmethod
    def _fits(self, num_bytes: int) -> bool:
        """Whether `num_bytes` more may be held now."""

    def _hold(self, num_bytes: int) -> None:
        self._num_holders += 1
        self._num_bytes += num_bytes

    def _grant(self) -> None:
        for queue in (self._waiting, self._waiting_last):
            while queue:
                num_bytes, granted = queue[0]
                if not granted.done():  # else whoever waited was cancelled
                    if not self._fits(num_bytes):
                        return
                    self._hold(num_bytes)
                    granted.set_result(None)
                queue.popleft()


class ByteBudget(_ByteQueue):
    """At most `max_bytes` between request and restored values; a larger unit goes alone."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def _fits(self, num_bytes: int) -> bool:
        return not self.used_bytes or self.used_bytes + num_bytes <= self._max_bytes


class ReadQueue(_ByteQueue):
    """Bytes of reads under way: as many as keep the link full, given out in order.

    Reads that share a link all become slower: the units that decoders wait for come no sooner than
    those that follow them, and what follows was chosen (`variants`) with less known. So where one
    connection can fill the link, there are two reads, and more only while what is under way is less than
    the link holds. Measured at 1 Gbit/s on two cores (bench_fetch, `exact`): 0.36 s to the first token
    with two reads at one time, 0.45 s with up to eight.

    Args:
        max_reads: never more at one time.
        window_bytes: what the link holds now; asked again whenever a read may start.
    """

    def __init__(self, max_reads: int, *, window_bytes: Callable[[], float]) -> None:
        super().__init__()
        self._max_reads = max_reads
        self._window_bytes = window_bytes

    def _fits(self, num_bytes: int) -> bool:
        return may_read(
            self.num_holders,
            self.used_bytes,
            max_reads=self._max_reads,
            window_bytes=self._window_bytes,
        )


def full_window_bytes(link: LinkEstimate) -> float:
    """What must be under way, so that the link is never idle."""
    return link.recent_bytes_per_second * (link.rtt_seconds + _DELAY_SECONDS)


def may_read(
    num_reads: int, num_bytes: float, *, max_reads: int, window_bytes: Callable[[], float]
) -> bool:
    """Whether a read may start beside `num_reads` of `num_bytes` together."""
    if num_reads >= max_reads:
        return False
    return num_reads < _MIN_READS or num_bytes < window_bytes()
