"""Small reads that keep the link's estimate fresh while the gate keeps requests from the link.

Who does not fetch because the link was slow would never hear that it is fast again. A probe runs
beside the request that caused it, which computes and does not wait; what it reads is thrown away.
One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from kvfetcher.errors import StoreError
from kvfetcher.fetch.reads import Tally
from kvfetcher.storage.base import ByteRange

if TYPE_CHECKING:
    from kvfetcher.fetch.planning.bandwidth import LinkEstimate
    from kvfetcher.fetch.reads import SharedReads
    from kvfetcher.fetch.run import StoredChunk

_log = logging.getLogger(__name__)

# A probe may take so much of the link, as it is known, and no more often than this: at most an
# eighth of a link that nobody fetches over.
_PROBE_SECONDS = 0.25
_PAUSE_SECONDS = 2.0
_TIMEOUT_SECONDS = 2.0
# Less is all round trip on a fast link; more than a few round trips teaches nothing new. (1 MiB takes
# half a millisecond at 16 Gbit/s: simulated with 1 ms of round trip, the link stayed at 3 Gbit/s.)
_MIN_BYTES, _ENOUGH_BYTES, _MAX_BYTES = 256 << 10, 1 << 20, 4 << 20
_ROUND_TRIPS = 10.0
# After a probe that did not end in time the next one is smaller, down to what tells a rate at all.
_SHRINK = 0.25
_LEAST_BYTES = 32 << 10


class LinkProbe:
    """See the module's text.

    Args:
        reads: tells the link's estimator of every read.
    """

    def __init__(self, reads: SharedReads) -> None:
        self._reads = reads
        self._task: asyncio.Task[None] | None = None
        self._share = 1.0

    def consider(self, chunk: StoredChunk, link: LinkEstimate) -> bool:
        """Start a probe if the estimate has grown old; whether one was started.

        Args:
            chunk: stored beyond the link; its first bytes are read.
            link: as estimated now.
        """
        is_running = self._task is not None and not self._task.done()
        if is_running or chunk.is_local or link.age_seconds < _PAUSE_SECONDS:
            return False
        enough = _ROUND_TRIPS * link.rtt_seconds * link.bytes_per_second
        most = min(max(enough, _ENOUGH_BYTES), _MAX_BYTES)
        wanted = min(max(_PROBE_SECONDS * link.bytes_per_second, _MIN_BYTES), most)
        num_bytes = max(_LEAST_BYTES, int(wanted * self._share))
        part = ByteRange(chunk.name, 0, min(num_bytes, chunk.header.object_bytes))
        self._task = asyncio.create_task(self._read(part))
        return True

    async def _read(self, part: ByteRange) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                await self._reads.read(part, Tally())
            self._share = 1.0
        except (StoreError, TimeoutError) as exc:
            self._share *= _SHRINK
            _log.debug("a probe of the link failed: %s", exc)
