"""Which units to get, in which order: pure functions, data in, data out.

Nothing here does I/O, so every rule of the fetcher can be tested without a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.arena import BlockTarget
    from kvfetcher.container import ChunkHeader, UnitEntry


@dataclass(frozen=True, slots=True)
class UnitJob:
    """One unit to fetch, decode and restore into `target`."""

    chunk_index: int
    object_name: str
    header: ChunkHeader
    entry: UnitEntry
    target: BlockTarget


def usable_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Whole chunks that may come from the store.

    The last prompt token is always computed, because its logits start the generation.
    """
    return max(0, num_tokens - 1) // chunk_tokens


def probe_batches(num_chunks: int) -> list[range]:
    """Chunk indices to look up together: 1, then 2, 4, 8, ... up to 32 at a time.

    A miss (the common case of a cold store) costs one call, a long hit few round trips.
    """
    batches, start, size = [], 0, 1
    while start < num_chunks:
        batches.append(range(start, min(start + size, num_chunks)))
        start += size
        size = min(2 * size, 32)
    return batches


def choose_variant(header: ChunkHeader) -> str:
    """The variant to fetch: the first one that the chunk holds."""
    return header.variants[0]


def plan_units(
    headers: Sequence[ChunkHeader],
    object_names: Sequence[str],
    target: BlockTarget,
    tokens_per_block: int,
) -> list[UnitJob]:
    """Jobs in the order in which they should start: chunk by chunk, layers bottom up.

    Args:
        headers: consecutive chunks from position 0.
        object_names: their names in the store.
        target: leased blocks for the tokens of all chunks.
        tokens_per_block: tokens of one block; chunks are whole numbers of blocks.
    """
    jobs: list[UnitJob] = []
    first_token = 0
    for index, (header, name) in enumerate(zip(headers, object_names, strict=True)):
        part = target.span(first_token, header.num_tokens, tokens_per_block=tokens_per_block)
        jobs.extend(
            UnitJob(index, name, header, entry, part)
            for entry in header.units_of(choose_variant(header))
        )
        first_token += header.num_tokens
    return jobs
