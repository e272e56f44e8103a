"""By how much this machine's decoders and restorers differ from the table of decode times. Pure.

Two things are learnt of decoding. What one unit takes that has a decoder to itself is what the last
units of a fetch are waited for. What units take one after the other while all decoders are busy
(`DecodeThroughput`) is what decides between coded and raw units: messages between processes, copies and shared
cores come on top there. One factor for both is wrong for both: on two cores the throughput of `exact`
units is 2 to 3 times what their own times say (bench_fetch at 5 Gbit/s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfetcher.fetch.planning.decode_times import DecodeCorrection, Factors
from kvfetcher.fetch.planning.throughput import DecodeThroughput

if TYPE_CHECKING:
    from kvfetcher.fetch.planning.variants import UnitOption


class StageLearning:
    """Watches units go to the decoders and come back; not those that need none. Not thread-safe.

    Args:
        num_decoders: units that are decoded side by side.
    """

    def __init__(self, num_decoders: int) -> None:
        self._latency = DecodeCorrection()
        self._busy = DecodeCorrection()
        """On top of the latency's: where units alone take longer, so do units side by side."""
        self._restore = DecodeCorrection()
        self._decoders = DecodeThroughput(num_decoders)
        self._num_decoders = num_decoders

    @property
    def factors(self) -> Factors:
        """The factors learnt so far."""
        latency = self._latency.factor
        return Factors(latency, latency * self._busy.factor, self._restore.factor)

    def begin(self) -> None:
        """A unit goes to the decoders."""
        self._decoders.begin()

    def drop(self) -> None:
        """A unit came back without having been decoded."""
        self._decoders.drop()

    def end(self, option: UnitOption, factors: Factors, status: UnitStatus, now: float) -> None:
        """A unit is restored.

        Args:
            option: its times as they were predicted.
            factors: with which they were predicted.
            status: what it took.
            now: seconds, monotonic.
        """
        was_alone = not self._decoders.is_saturated
        # Where restoring is slower, it is the bound, and nothing is learnt of the decoders.
        restoring = self._num_decoders * option.restore_interval_seconds
        stretch = self._decoders.end(max(option.decode_seconds / factors.decode, restoring), now)
        if stretch is not None:
            expected = stretch.predicted_seconds * self._latency.factor
            self._busy.observe(expected, stretch.actual_seconds)
        elif was_alone:
            self._latency.observe(option.latency_seconds / factors.latency, status.decode_ms / 1e3)
        self._restore.observe(option.restore_seconds / factors.restore, status.restore_ms / 1e3)


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """What decoding and restoring one unit took."""

    decoder: str
    decode_ms: float
    restore_ms: float
