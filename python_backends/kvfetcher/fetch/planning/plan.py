"""Which chunks to ask a store for: pure functions, data in, data out."""

from __future__ import annotations

from kvfetcher.storage.base import SINGLE_LOOKUP_BATCH


def usable_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Whole chunks that may come from the store.

    The last prompt token is always computed, because its logits start the generation.
    """
    return max(0, num_tokens - 1) // chunk_tokens


def probe_batches(num_chunks: int, batch_size: int = SINGLE_LOOKUP_BATCH) -> list[range]:
    """Chunk indices to look up together, each batch in one round trip where the store can.

    A store that answers many headers in one request is asked for `batch_size` from the start. From
    others it is 1, then 4, 16, and `batch_size` at a time: a miss (the common case of a cold store)
    asks for one object, a hit of 21 chunks takes three round trips.

    Args:
        num_chunks: that may be there.
        batch_size: the store's (`GetRanges.lookup_batch_size`).
    """
    batches, start = [], 0
    size = batch_size if batch_size > SINGLE_LOOKUP_BATCH else 1
    while start < num_chunks:
        batches.append(range(start, min(start + size, num_chunks)))
        start += size
        size = min(4 * size, batch_size)
    return batches
