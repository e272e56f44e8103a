"""Transfer, decode and restore with their bounds: what all fetches of a process share.

Each stage has a bound of its own, so that they overlap: reads under way, bytes between their
request and their restored values, units at the decoders. One event loop.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from kvfetcher.fetch.learning import StageLearning, UnitStatus
from kvfetcher.fetch.planning.pipeline import Machine
from kvfetcher.fetch.planning.variants import UnitWalk, chunk_options
from kvfetcher.fetch.queues import ByteBudget, PrioritySlots, ReadQueue, full_window_bytes
from kvfetcher.memory.arena import BlockTarget

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvfetcher.fetch.planning.bandwidth import LinkEstimate, LinkEstimator
    from kvfetcher.fetch.planning.decode_times import DecodeTable, Factors
    from kvfetcher.fetch.reads import SharedReads
    from kvfetcher.format.container import ChunkHeader

# Length of a read that is aimed at: long enough that its round trip does not matter, short enough
# that decoding the first bytes does not wait for the last.
_READ_SECONDS = 0.02
_READ_ROUND_TRIPS = 2.0
# Nor longer than this part of what is left of a fetch: decoders do nothing before the first read has
# come, and nothing is fetched once the last one has. Simulated: 0.3 to 0.5 % less time to the first
# token.
_READ_SHARE = 0.1


RunUnit = Callable[[bytes, BlockTarget], Awaitable[UnitStatus]]


@dataclass(slots=True)
class Backlog:
    """Work that was promised and is not done."""

    num_bytes: int = 0
    decode_seconds: float = 0.0
    restore_seconds: float = 0.0
    """Of all restoring processes together, `UnitOption.restore_interval_seconds`."""

    def add(self, work: Backlog) -> None:
        """More was promised."""
        self.num_bytes += work.num_bytes
        self.decode_seconds += work.decode_seconds
        self.restore_seconds += work.restore_seconds

    def remove(self, work: Backlog) -> None:
        """This much was done, or will not be."""
        self.num_bytes -= work.num_bytes
        self.decode_seconds -= work.decode_seconds
        self.restore_seconds -= work.restore_seconds


class Stages:
    """What fetches share; each field says who changes it.

    Args:
        reads: the store.
        link: that the reads go over.
        table: decode times.
        num_decoders: units decoded side by side.
        run_unit: decodes and restores one unit.
        max_inflight_reads: range reads under way.
        one_read_fills_link: else only many reads at one time do.
        max_inflight_bytes: bytes requested and not restored yet.
        max_inflight_units: units at the decoders; as many that need none are being restored.
        max_read_bytes: neighbouring units are read together up to this.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        reads: SharedReads,
        link: LinkEstimator,
        table: DecodeTable,
        num_decoders: int,
        run_unit: RunUnit,
        max_inflight_reads: int,
        one_read_fills_link: bool,
        max_inflight_bytes: int,
        max_inflight_units: int,
        max_read_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.reads = reads
        self.table = table
        self.learning = StageLearning(num_decoders)
        self.run_unit = run_unit
        self.read_queue = ReadQueue(max_inflight_reads, window_bytes=self._window_bytes)
        self.budget = ByteBudget(max_inflight_bytes)
        self.unit_slots = PrioritySlots(max_inflight_units)
        self.copy_slots = PrioritySlots(max_inflight_units)
        """For units that need no decoder: behind those that wait for one they would do nothing."""
        self.run_numbers = count()
        """Numbers of the runs, in the order in which they began."""
        self.clock = clock
        self.requested = Backlog()
        """Reads under way, and units that are read or at a decoder; kept by the runs."""
        self.planned = Backlog()
        """What fetches still have to request; kept by the runs."""
        self._link = link
        self._num_decoders = num_decoders
        self._max_inflight_reads = max_inflight_reads
        self._max_read_bytes = max_read_bytes
        self._one_read_fills_link = one_read_fills_link

    def link(self) -> LinkEstimate:
        """The link as of now."""
        return self._link.estimate(self.clock())

    def machine(self, *, with_planned: bool, without: Backlog | None = None) -> Machine:
        """What is in the way of new work.

        Args:
            with_planned: count what other fetches have not requested yet, too.
            without: part of it that is not in the way.
        """
        ahead = replace(self.requested)
        if with_planned:
            ahead.add(self.planned)
        if without is not None:
            ahead.remove(without)
        return Machine(
            num_decoders=self._num_decoders,
            decode_queue_seconds=max(0.0, ahead.decode_seconds) / self._num_decoders,
            network_queue_bytes=max(0, ahead.num_bytes),
            restore_queue_seconds=max(0.0, ahead.restore_seconds),
        )

    def walk(
        self, headers: Iterable[ChunkHeader], factors: Factors, *, hysteresis: float
    ) -> UnitWalk:
        """A walk over all units of stored chunks.

        Args:
            headers: headers of consecutive chunks.
            factors: real times over the table's, as of now (`StageLearning.factors`).
            hysteresis: see `choose_variant`.
        """
        options = [chunk_options(header, self.table, factors) for header in headers]
        return UnitWalk(options, hysteresis=hysteresis)

    def read_bytes(self, link: LinkEstimate, *, left_bytes: int = 0) -> int:
        """Up to how many bytes neighbouring units are read together.

        Args:
            link: as estimated now.
            left_bytes: of a fetch, still to be asked for; 0 = they are not decoded, or take no link.
        """
        round_trips = _READ_ROUND_TRIPS * link.rtt_seconds
        limit = max(_READ_SECONDS, round_trips) * link.bytes_per_second
        if left_bytes:
            # As many reads as there may be at one time hide their round trips together.
            least = round_trips * link.bytes_per_second / self._max_inflight_reads
            limit = min(limit, max(least, _READ_SHARE * left_bytes))
        return min(self._max_read_bytes, int(limit))

    def _window_bytes(self) -> float:
        return full_window_bytes(self.link()) if self._one_read_fills_link else math.inf
