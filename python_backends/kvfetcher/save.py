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

from kvfetcher.errors import KVFetcherError
from kvfetcher.keys import chunk_keys

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.arena import BlockTarget
    from kvfetcher.fetch.fetcher import FetchFacts, LeaseService
    from kvfetcher.keys import ChunkKey
    from kvfetcher.leases import SaveTicket
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


class Saver:
    """Saves the chunks of one ticket at a time."""

    def __init__(self, *, store: Store, leases: LeaseService, encode_chunk: EncodeChunk) -> None:
        self._store = store
        self._leases = leases
        self._encode_chunk = encode_chunk

    async def save(self, input_ids: NDArray[np.int32], ticket: SaveTicket) -> SaveReport:
        """Encode and store the ticket's chunks; its lease is released, whatever happens.

        A chunk that the store already holds is not encoded again. A failure ends the ticket (later
        chunks could not be found without the failed one) and is reported, not raised.
        """
        report = SaveReport()
        try:
            await self._save(input_ids, ticket, report)
        except KVFetcherError as exc:
            report.error = str(exc)
            _log.warning("saving stopped after %d chunks: %s", report.chunks_saved, exc)
        finally:
            await self._leases.release(ticket.lease_id)
        _log.info("save: %s", report.to_json())
        return report

    async def _save(
        self, input_ids: NDArray[np.int32], ticket: SaveTicket, report: SaveReport
    ) -> None:
        facts = await self._leases.facts()
        keys = chunk_keys(input_ids, facts.chunk_tokens, facts.identity_digest, ticket.cache_salt)
        for index, target in enumerate(ticket.targets, start=ticket.first_chunk):
            key = keys[index]
            if await self._store.head(key.name) is not None:
                report.chunks_known += 1
                continue
            tokens = input_ids[index * facts.chunk_tokens : (index + 1) * facts.chunk_tokens]
            started = time.perf_counter()
            chunk = await self._encode_chunk(tokens, key, facts, target)
            encoded = time.perf_counter()
            await self._store.put(key.name, chunk)
            report.encode_ms += (encoded - started) * 1e3
            report.store_ms += (time.perf_counter() - encoded) * 1e3
            report.chunks_saved += 1
            report.bytes_saved += len(chunk)
