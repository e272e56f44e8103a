"""When a second, equal read is worth sending: past latencies and a budget. No clock, no I/O.

A read that takes much longer than its like is often stuck behind something that a second one is
not (J. Dean, L. A. Barroso, "The Tail at Scale", 2013). The delay is a robust percentile of what
reads of about the same size took; the budget keeps second reads to a few percent of all.
"""

from __future__ import annotations

from collections import deque

_SAMPLES = 64  # of each size class; old enough to be robust, young enough to follow the network
_MIN_SAMPLES = 16
_PERCENTILE = 0.95
# Measured latencies of one size class spread by up to 4x in size; and a second read just after the
# 95th percentile would often meet a first one that is about to end.
_SLACK = 2.0
_MIN_DELAY_SECONDS = 0.02
_MAX_SAVED_HEDGES = 4.0
# A read that was given up after this multiple of its usual latency counts against the store.
_STALLED_SLACK = 5.0
_MIN_STALLED_SECONDS = 1.0


class HedgePolicy:
    """Latencies by size, and the budget. Not thread-safe.

    Args:
        fraction: second reads per read, on average; 0 = never.
    """

    def __init__(self, *, fraction: float) -> None:
        self._fraction = fraction
        self._latencies: dict[int, deque[float]] = {}
        self._saved = 0.0

    def record(self, num_bytes: int, seconds: float) -> None:
        """A read of `num_bytes` was answered after `seconds`."""
        samples = self._latencies.setdefault(_size_class(num_bytes), deque(maxlen=_SAMPLES))
        samples.append(seconds)
        self._saved = min(_MAX_SAVED_HEDGES, self._saved + self._fraction)

    def delay_seconds(self, num_bytes: int) -> float | None:
        """After how long a second read is worth it; None = too little is known of such reads."""
        usual = self._usual_seconds(num_bytes)
        if usual is None or not self._fraction:
            return None
        return max(_SLACK * usual, _MIN_DELAY_SECONDS)

    def take(self) -> bool:
        """Take one second read out of the budget; False = it is used up."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True

    def stalled_seconds(self, num_bytes: int) -> float | None:
        """Seconds after which a read without an answer is a failure; None = nothing is known."""
        usual = self._usual_seconds(num_bytes)
        return None if usual is None else max(_STALLED_SLACK * usual, _MIN_STALLED_SECONDS)

    def _usual_seconds(self, num_bytes: int) -> float | None:
        samples = self._latencies.get(_size_class(num_bytes), ())
        if len(samples) < _MIN_SAMPLES:
            return None
        return sorted(samples)[int(_PERCENTILE * (len(samples) - 1))]


def _size_class(num_bytes: int) -> int:
    """Reads within a factor of four are alike."""
    return max(0, num_bytes.bit_length() - 1) // 2
