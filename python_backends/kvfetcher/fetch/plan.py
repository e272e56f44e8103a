"""Which chunks to ask a store for: pure functions, data in, data out."""

from __future__ import annotations


def usable_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Whole chunks that may come from the store.

    The last prompt token is always computed, because its logits start the generation.
    """
    return max(0, num_tokens - 1) // chunk_tokens


def probe_batches(num_chunks: int) -> list[range]:
    """Chunk indices to look up together: 1, then 4, 16, and 32 at a time.

    A batch is one round trip where the store can. A miss (the common case of a cold store) asks for
    one object, a hit of 21 chunks takes three round trips.
    """
    batches, start, size = [], 0, 1
    while start < num_chunks:
        batches.append(range(start, min(start + size, num_chunks)))
        start += size
        size = min(4 * size, 32)
    return batches
