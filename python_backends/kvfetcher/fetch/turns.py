"""Bytes that are held at one time, given out in order of arrival. One event loop."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Turns(ABC):
    """Who holds how many bytes, and who waits; a subclass says what fits."""

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
        """Wait for room, behind all that came before; obliges to `give` the same number.

        Args:
            num_bytes: how many.
            last: let those pass, too, that come later and do not ask to be last.
        """
        queue = self._waiting_last if last else self._waiting
        if not queue and not (last and self._waiting) and self._fits(num_bytes):
            self._hold(num_bytes)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted, but nobody is there to use it
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
        """Whether so many bytes more may be held now."""

    def _hold(self, num_bytes: int) -> None:
        self._num_holders += 1
        self._num_bytes += num_bytes

    def _grant(self) -> None:
        for queue in (self._waiting, self._waiting_last):
            while queue:
                num_bytes, turn = queue[0]
                if not turn.done():  # else whoever waited was cancelled
                    if not self._fits(num_bytes):
                        return
                    self._hold(num_bytes)
                    turn.set_result(None)
                queue.popleft()
