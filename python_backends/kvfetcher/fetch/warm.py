"""Bring whole chunks into the store's tier, behind every request that waits for KV.

What is read is thrown away: the store keeps copies of all that passes. One read at a time over all
requests that warm, and a small one, so that whoever needs bytes now waits at most for that one.
One event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvfetcher.fetch.stages import Backlog
from kvfetcher.format import container
from kvfetcher.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfetcher.fetch.reads import Tally
    from kvfetcher.fetch.run import StoredChunk
    from kvfetcher.fetch.stages import Stages
    from kvfetcher.format.container import ChunkHeader, UnitEntry


class Warmer:
    """Reads chunks.

    Args:
        stages: shared with the fetches, which go first there.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._turn = asyncio.Lock()

    async def read(self, chunk: StoredChunk, tally: Tally) -> None:
        """Read a whole chunk and check it.

        Raises:
            FormatError: it is damaged.
            StoreError: the store's.
        """
        limit = self._stages.read_bytes(self._stages.link())
        start = 0
        for entries in _parts(chunk.header, limit):
            part = ByteRange(chunk.name, start, entries[-1].stop)
            async with self._turn:
                data = await self._read(part, tally, is_local=chunk.is_local)
            await asyncio.to_thread(_check, chunk.header, entries, start, data)
            start = part.end

    async def _read(self, part: ByteRange, tally: Tally, *, is_local: bool) -> bytes:
        stages, size = self._stages, part.end - part.start
        work = Backlog(0 if is_local else size)
        async with stages.read_queue.hold(size, last=True), stages.budget.hold(size):
            stages.requested.add(work)
            try:
                return await stages.reads.read(part, tally)
            finally:
                stages.requested.remove(work)


def _parts(header: ChunkHeader, limit_bytes: int) -> Iterator[list[UnitEntry]]:
    """A chunk's units, which lie without gaps, as many together as the limit allows; none empty."""
    part: list[UnitEntry] = []
    start = 0  # the first part has the header, too
    for entry in header.units:
        if part and entry.stop - start > limit_bytes:
            yield part
            part, start = [], part[-1].stop
        part.append(entry)
    yield part


def _check(header: ChunkHeader, entries: list[UnitEntry], start: int, data: bytes) -> None:
    for entry in entries:
        unit = memoryview(data)[entry.offset - start : entry.stop - start]
        container.check_unit(header, entry, unit)
