"""A bound on bytes that are held at one time, given out in order of arrival. One event loop."""

from __future__ import annotations

import asyncio
from collections import deque


class ByteBudget:
    """At most `max_bytes` are out at one time; one that is larger goes alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used_bytes(self) -> int:
        return self._used

    async def take(self, num_bytes: int) -> None:
        """Wait for room, behind all that came before; obliges to `give` the same number."""
        if not self._waiting and self._fits(num_bytes):
            self._used += num_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted, but nobody is there to use it
                self.give(num_bytes)
            else:
                self._waiting.remove((num_bytes, turn))
                self._grant()
            raise

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        self._used -= num_bytes
        self._grant()

    def _fits(self, num_bytes: int) -> bool:
        return not self._used or self._used + num_bytes <= self._max_bytes

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            num_bytes, turn = self._waiting.popleft()
            self._used += num_bytes
            turn.set_result(None)
