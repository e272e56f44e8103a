"""Reads under way at one time: as many as keep the link full, given out in order. One event loop.

Reads that share a link all become slower: the units that decoders wait for come no sooner than
those that follow them, and what follows was chosen (`variants`) with less known. So where one
connection can fill the link, there are two reads, and more only while what is under way is less than
the link holds. Measured at 1 Gbit/s on two cores (bench_fetch, `exact`): 0.36 s to the first token
with two reads at one time, 0.45 s with up to eight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfetcher.fetch.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.fetch.planning.bandwidth import LinkEstimate

# While one arrives, the next one's request is on its way.
_MIN_READS = 2
# What a busy event loop may take to ask for the next read.
_DELAY_SECONDS = 0.005


def full_window_bytes(link: LinkEstimate) -> float:
    """What must be under way, so that the link is never idle."""
    return link.recent_bytes_per_second * (link.rtt_seconds + _DELAY_SECONDS)


def may_read(
    num_reads: int, num_bytes: float, *, max_reads: int, window_bytes: Callable[[], float]
) -> bool:
    """Whether a read may start beside `num_reads` of `num_bytes` together."""
    if num_reads >= max_reads:
        return False
    return num_reads < _MIN_READS or num_bytes < window_bytes()


class ReadPlaces(Turns):
    """Places for reads.

    Args:
        max_reads: never more at one time.
        window_bytes: what the link holds now; asked again at every turn.
    """

    def __init__(self, max_reads: int, *, window_bytes: Callable[[], float]) -> None:
        super().__init__()
        self._max_reads = max_reads
        self._window_bytes = window_bytes

    def _fits(self, num_bytes: int) -> bool:
        return may_read(
            self.num_holders,
            self.used_bytes,
            max_reads=self._max_reads,
            window_bytes=self._window_bytes,
        )
