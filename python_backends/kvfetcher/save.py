"""Save computed chunks: leased KV -> encoder -> store, off every request's path.

Handed the store, the engine's lease service and a callable that encodes one chunk; knows no codec
and no Triton.
"""

from __future__ import annotations

import json
import logging
import time
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
    """Of the ticket, for who asked to compare."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


class Saver:
    """Saves the chunks of one ticket at a time."""

    def __init__(self, *, store: Store, leases: LeaseService, encode_chunk: EncodeChunk) -> None:
        self._store = store
        self._leases = leases
        self._encode_chunk = encode_chunk

    async def save(self, ticket: SaveTicket) -> SaveReport:
        """Encode and store the ticket's chunks; its lease is released, whatever happens.

        A chunk that the store already holds is not encoded again. A failure ends the ticket (later
        chunks could not be found without the failed one) and is reported, not raised.
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
        for index, target in enumerate(ticket.targets, start=ticket.first_chunk_index):
            key = keys[index]
            if await self._store.head(key.name) is not None:
                report.chunks_known += 1
                continue
            tokens = token_ids[index * facts.chunk_tokens : (index + 1) * facts.chunk_tokens]
            started = time.perf_counter()
            chunk = await self._encode_chunk(tokens, key, facts, target)
            # The encoder copied the values out of leased blocks; only a lease that still stands
            # now proves that nobody else wrote to them meanwhile.
            await self._leases.renew(ticket.lease_id)
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
