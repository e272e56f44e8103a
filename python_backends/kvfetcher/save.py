"""Save computed chunks: leased KV -> encoder -> store, off every request's path.

Handed the store, the engine's lease service and a callable that encodes one chunk; knows no codec
and no Triton.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.errors import KVFetcherError
from kvfetcher.format.keys import chunk_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.fetch.fetcher import FetchFacts, LeaseService
    from kvfetcher.format.keys import ChunkKey
    from kvfetcher.memory.arena import BlockTarget
    from kvfetcher.memory.leases import SaveTicket
    from kvfetcher.storage.base import Store

_log = logging.getLogger(__name__)

EncodeChunk = Callable[
    ["NDArray[np.int32]", "ChunkKey", "FetchFacts", "BlockTarget"], Awaitable[bytes]
]


@dataclass(slots=True)
class SaveReport:
    """What became of one ticket; `error` is the first failure, "" for none."""

    chunks_saved: int = 0
    chunks_known: int = 0
    bytes_saved: int = 0
    encode_ms: float = 0.0
    store_ms: float = 0.0
    error: str = ""
    lease_id: str = ""
    """Lease of the ticket, for the caller to compare."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


class Saver:
    """Saves the chunks of one ticket at a time.

    Args:
        store: where to.
        leases: leases of the engine.
        encode_chunk: makes one chunk object; called for several chunks at a time.
        chunks_in_flight: chunks encoded or stored side by side, so that an encoder on a GPU gets
            enough at a time; it bounds the objects in memory.
    """

    def __init__(
        self,
        *,
        store: Store,
        leases: LeaseService,
        encode_chunk: EncodeChunk,
        chunks_in_flight: int = 1,
    ) -> None:
        self._store = store
        self._leases = leases
        self._encode_chunk = encode_chunk
        self._chunks_in_flight = chunks_in_flight

    async def save(self, ticket: SaveTicket) -> SaveReport:
        """Encode and store the ticket's chunks; its lease is released, whatever happens.

        A chunk that the store already holds is not encoded again. Each is stored when it is finished,
        also before an earlier one. A failure ends the ticket (later chunks could not be found without
        the failed one) and is reported, not raised.
        """
        report = SaveReport(lease_id=ticket.lease_id)
        try:
            await self._save(ticket, report)
        except KVFetcherError as exc:
            report.error = str(exc)
            _log.warning("saving stopped after %d chunks: %s", report.chunks_saved, exc)
        finally:
            await self._release(ticket.lease_id)
        _log.info("save: %s", report.to_json())
        return report

    async def _save(self, ticket: SaveTicket, report: SaveReport) -> None:
        facts = await self._leases.facts()
        token_ids = np.asarray(ticket.token_ids, dtype=np.int32)
        keys = chunk_keys(
            ticket.token_ids, facts.chunk_tokens, facts.identity_digest, ticket.cache_salt
        )
        waiting = deque(enumerate(ticket.targets, start=ticket.first_chunk_index))

        async def work() -> None:
            while waiting:
                index, target = waiting.popleft()
                tokens = token_ids[index * facts.chunk_tokens : (index + 1) * facts.chunk_tokens]
                try:
                    await self._save_chunk(
                        ticket.lease_id, tokens, keys[index], facts, target, report
                    )
                except BaseException:
                    waiting.clear()
                    raise

        workers = [asyncio.ensure_future(work()) for _ in range(self._chunks_in_flight)]
        try:
            # Those that run when one fails are finished: the encoder still reads leased blocks.
            done = await asyncio.gather(*workers, return_exceptions=True)
        except asyncio.CancelledError:
            for worker in workers:
                worker.cancel()
            raise
        for result in done:
            if isinstance(result, BaseException):
                raise result

    async def _save_chunk(
        self,
        lease_id: str,
        tokens: NDArray[np.int32],
        key: ChunkKey,
        facts: FetchFacts,
        target: BlockTarget,
        report: SaveReport,
    ) -> None:
        if await self._store.head(key.name) is not None:
            report.chunks_known += 1
            return
        started = time.perf_counter()
        chunk = await self._encode_chunk(tokens, key, facts, target)
        # The encoder copied the values out of leased blocks; only a lease that still stands
        # now proves that nobody else wrote to them meanwhile.
        await self._leases.renew(lease_id)
        encoded = time.perf_counter()
        await self._store.put(key.name, chunk)
        report.encode_ms += (encoded - started) * 1e3
        report.store_ms += (time.perf_counter() - encoded) * 1e3
        report.chunks_saved += 1
        report.bytes_saved += len(chunk)

    async def _release(self, lease_id: str) -> None:
        try:
            await self._leases.release(lease_id)
        except KVFetcherError as exc:  # expired, or the engine is gone: nothing is left to free
            _log.warning("lease %s not released: %s", lease_id, exc)
