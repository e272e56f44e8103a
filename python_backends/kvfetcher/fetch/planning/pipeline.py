"""When a fetch will be done: transfer, decode and restore of chunks as a pipeline. Pure.

The three stages work side by side on different chunks, each at its own rate; what is predicted is
when each chunk leaves the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.fetch.planning.bandwidth import LinkEstimate


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """What one chunk asks of each stage."""

    num_bytes: int
    decode_seconds: float
    """Decode time summed over decoders: n of them take an n-th of it."""
    tail_seconds: float
    """Time from the last unit's last byte to its planes, on an idle decoder."""
    restore_seconds: float


@dataclass(frozen=True, slots=True)
class Machine:
    """The state of a host when a fetch begins."""

    num_decoders: int
    decode_queue_seconds: float = 0.0
    """Work of all decoders together, divided by their number: units that are decoded, that wait for
    a decoder, and that are on their way."""
    network_queue_bytes: int = 0
    """Asked for by others and not arrived: these share the link first."""
    restore_queue_seconds: float = 0.0
    """Work of all restoring processes together, of units that were asked for and are not restored."""


def finish_times(
    chunks: Sequence[ChunkCost], *, link: LinkEstimate, machine: Machine
) -> list[float]:
    """Seconds from now until each chunk, and all before it, are restored; never decreasing.

    Args:
        chunks: what is not asked for yet of each, in the order in which it is fetched.
        link: estimated now; its round trip is paid once, after that requests overlap.
        machine: what is in the way already.
    """
    total = machine.network_queue_bytes + sum(chunk.num_bytes for chunk in chunks)
    rate = link.rate_for(total)
    # While something is on its way, the next request's round trip is hidden behind it.
    arrived = machine.network_queue_bytes / rate or link.rtt_seconds
    decoded = machine.decode_queue_seconds
    restored = 0.0
    finished = []
    for chunk in chunks:
        arrived += chunk.num_bytes / rate
        decoded = max(
            arrived + chunk.tail_seconds, decoded + chunk.decode_seconds / machine.num_decoders
        )
        restored = max(decoded, restored) + chunk.restore_seconds
        finished.append(restored)
    return finished
