"""Which chunks of a prompt the store holds: headers read in few round trips, and checked.

A header is read again once before it counts as corrupt, because what came damaged need not be
damaged where it lies.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.errors import (
    ChunkNotFoundError,
    FormatError,
    StoreError,
    StoreUnavailableError,
)
from kvfetcher.fetch.planning.plan import probe_batches
from kvfetcher.fetch.reads import Tally
from kvfetcher.fetch.run import StoredChunk
from kvfetcher.format import container
from kvfetcher.storage.base import SINGLE_LOOKUP_BATCH, ByteRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvfetcher.fetch.reads import SharedReads
    from kvfetcher.format.container import ChunkHeader
    from kvfetcher.format.keys import ChunkKey


@dataclass(slots=True)
class Found:
    """What a look-up found: usable chunks from position 0 on, and why it ended before the last key.

    At most one of `failure` (the store or the object failed) and `mismatch` (the object is of
    something else) is set; none of them = the store has no further chunk.
    """

    chunks: list[StoredChunk] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    ended_at: str = ""
    """Name of the object at which it ended; "" = all keys were found."""
    failure: BaseException | None = None
    mismatch: str = ""


async def look_up(
    reads: SharedReads,
    keys: Sequence[ChunkKey],
    input_ids: NDArray[np.int32],
    *,
    identity_digest: bytes,
    chunk_tokens: int,
    found: Found,
) -> None:
    """Find the longest stored prefix.

    Args:
        reads: the store.
        keys: of all whole chunks that may be used, first to last.
        input_ids: the prompt.
        identity_digest: that every chunk must carry.
        chunk_tokens: tokens of one chunk.
        found: filled in as chunks are found, so that a caller that stops waiting keeps what there is.
    """
    for batch in probe_batches(len(keys), reads.lookup_batch_size):
        names = [keys[index].name for index in batch]
        parts = [ByteRange(name, 0, container.HEADER_READ_BYTES) for name in names]
        firsts = await _read_firsts(reads, parts, found.tally)
        for index, first in zip(batch, firsts, strict=True):
            key = keys[index]
            found.ended_at = key.name
            if isinstance(first, ChunkNotFoundError):
                return
            if isinstance(first, StoreError):
                found.failure = first
                return
            try:
                header = await _read_header(reads, key.name, first, found)
            except ChunkNotFoundError:
                return
            except (StoreError, FormatError) as exc:
                found.failure = exc
                return
            tokens = input_ids[index * chunk_tokens : (index + 1) * chunk_tokens]
            found.mismatch = _mismatch(header, key, tokens, identity_digest, chunk_tokens)
            if found.mismatch:
                return
            found.chunks.append(StoredChunk(key.name, header))
            found.ended_at = ""


async def _read_firsts(
    reads: SharedReads, parts: Sequence[ByteRange], tally: Tally
) -> list[bytes | StoreError]:
    """The first bytes of objects, in one round trip where the store can.

    The very first is asked for beside the others, not among them: only what is small tells the
    link's round trip, which nothing else would where all headers come together.
    """
    if reads.lookup_batch_size <= SINGLE_LOOKUP_BATCH or len(parts) == 1:
        return await reads.read_many(parts, tally)
    first, others = await asyncio.gather(
        reads.read_many(parts[:1], tally), reads.read_many(parts[1:], tally)
    )
    answers = first + others
    refused = [i for i, answer in enumerate(answers) if isinstance(answer, StoreUnavailableError)]
    if (
        0 < len(refused) < len(parts)
    ):  # a breaker let one call pass to try the store, and it is back
        again = await reads.read_many([parts[i] for i in refused], tally)
        for i, answer in zip(refused, again, strict=True):
            answers[i] = answer
    return answers


async def _read_header(reads: SharedReads, name: str, first: bytes, found: Found) -> ChunkHeader:
    try:
        return await _parse(reads, name, first, found)
    except FormatError:
        first = await reads.read(ByteRange(name, 0, container.HEADER_READ_BYTES), found.tally)
        return await _parse(reads, name, first, found)


async def _parse(reads: SharedReads, name: str, first: bytes, found: Found) -> ChunkHeader:
    needed = container.header_size(first)
    if needed > len(first):
        rest = await reads.read(ByteRange(name, len(first), needed), found.tally)
        first += rest
    return container.parse_header(first)


def _mismatch(
    header: ChunkHeader,
    key: ChunkKey,
    tokens: NDArray[np.int32],
    identity_digest: bytes,
    chunk_tokens: int,
) -> str:
    """Why a stored chunk is not the one that was asked for; "" if it is."""
    if header.identity != identity_digest:
        return "identity digest differs"
    if header.chunk_key != key.key or header.parent_key != key.parent:
        return "chunk key differs from the object's name"
    if header.first_position != key.index * chunk_tokens:
        return "first position differs"
    if not np.array_equal(np.asarray(header.token_ids, dtype=np.int64), tokens):
        return "token ids differ although the keys agree"
    return ""
