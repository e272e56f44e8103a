"""One fetch over a simulated link and simulated decoders: a discrete-event simulation.

The link is shared evenly by the transfers whose round trip has passed; decoders take units first
come, first served, each at the table's rate for the number that work; restoring is one stage behind
them. What is fetched next is asked of a `Policy`, which sees only what a real fetcher sees: a
bandwidth estimate from finished transfers, its queues, the table.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvfetcher.fetch.pipeline import Machine
from kvfetcher.fetch.read_places import full_window_bytes, may_read

if TYPE_CHECKING:
    from kvfetcher.bench.traces import Trace
    from kvfetcher.fetch.bandwidth import LinkEstimate, LinkEstimator
    from kvfetcher.fetch.decode_times import DecodeTable
    from kvfetcher.fetch.variants import UnitOption

_EPSILON_BYTES = 1e-3
QUESTION_SECONDS = 0.02
"""A policy is asked how much it wants at least so often."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the simulated fetcher."""

    rtt_seconds: float
    max_transfers: int
    """Requests to the store at one time."""
    transfer_bytes: int
    """Neighbouring units are asked for together up to so many bytes."""
    max_waiting_bytes: int
    """In transfer or in front of the decoders; the network rests when it is reached."""


class SimUnit(NamedTuple):
    """A unit with what the simulated decoder needs to know."""

    chunk: int
    option: UnitOption
    load: float
    """Of one picture, `picture_load`."""
    num_pictures: int
    """0 = not video, needs no decoder."""


class Policy(Protocol):
    """Decides what is fetched next."""

    def next(self, *, link: LinkEstimate, machine: Machine) -> SimUnit | None:
        """The next unit; None when everything was handed out."""

    def transfer_done(self, unit: SimUnit, started: float, finished: float) -> None:
        """A unit has arrived."""

    def num_wanted(self, num_ready: int, now: float, machine: Machine) -> int:
        """Chunks to end with, asked when one is ready and now and then; it may only shrink."""


@dataclass(slots=True)
class Outcome:
    """What a simulated fetch did; times in seconds."""

    fetch_seconds: float = 0.0
    num_chunks: int = 0
    """Restored, from the first."""
    num_bytes: int = 0
    network_bubble_seconds: float = 0.0
    """The link was free but nothing was asked for, because too much waited for the decoders."""
    decoder_bubble_seconds: float = 0.0
    """Decoders were free while units were still on their way, per decoder."""
    variants: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Transfer:
    units: list[SimUnit]
    started: float
    flows_from: float
    bytes_left: float
    token: int


class _Simulation:
    def __init__(
        self,
        policy: Policy,
        trace: Trace,
        table: DecodeTable,
        estimator: LinkEstimator,
        limits: Limits,
        *,
        start: float,
        num_chunks: int,
        num_layers: int,
    ) -> None:
        self.policy, self.trace, self.table = policy, trace, table
        self.estimator, self.limits = estimator, limits
        self.start = self.now = start
        self.outcome = Outcome()
        self.transfers: list[_Transfer] = []
        self.head: SimUnit | None = None  # drawn, not yet asked for
        self.drawn_all = False
        self.waiting: deque[SimUnit] = deque()
        self.decoding: list[tuple[float, int, SimUnit]] = []  # (decoder free, number, unit)
        self.late: dict[int, float] = {}  # by number, from there until the planes are out
        self.pending: list[tuple[float, int, SimUnit]] = []  # (planes out, number, unit)
        self.restoring: deque[tuple[float, SimUnit]] = deque()
        self.waiting_bytes = 0
        self.waiting_seconds = 0.0
        self.coming_seconds = 0.0
        self.layers_left: dict[int, int] = {}
        self.number = 0
        self.random = random.Random(0)
        self.num_layers = num_layers
        self.num_wanted = num_chunks
        self.ready = 0
        self.next_question = start + QUESTION_SECONDS

    def run(self) -> Outcome:
        self._ask()
        while self.ready < self.num_wanted:
            self._step()
            if self.now >= self.next_question:
                self._ask_how_much()
            self._ask()
        for transfer in self.transfers:
            self.estimator.end(transfer.token, self.now, ok=False)
        self.outcome.fetch_seconds = self.now - self.start
        self.outcome.num_chunks = self.ready
        return self.outcome

    def _machine(self) -> Machine:
        running = sum(max(0.0, done - self.now) for done, _, _ in self.decoding)
        return Machine(
            num_decoders=self.table.num_decoders,
            decode_queue_seconds=(running + self.waiting_seconds + self.coming_seconds)
            / self.table.num_decoders,
            network_queue_bytes=int(sum(t.bytes_left for t in self.transfers)),
        )

    def _draw(self) -> SimUnit | None:
        if self.head is None and not self.drawn_all:
            link = self.estimator.estimate(self.now)
            self.head = self.policy.next(link=link, machine=self._machine())
            self.drawn_all = self.head is None
        return self.head

    def _may_ask(self) -> bool:
        return may_read(
            len(self.transfers),
            sum(transfer.bytes_left for transfer in self.transfers),
            max_reads=self.limits.max_transfers,
            window_bytes=lambda: full_window_bytes(self.estimator.estimate(self.now)),
        )

    def _ask(self) -> None:
        """Start transfers while there is room."""
        while self._may_ask() and self.waiting_bytes < self.limits.max_waiting_bytes:
            first = self._draw()
            if first is None:
                return
            units: list[SimUnit] = []
            size = 0
            while (unit := self._draw()) is not None and (
                not units
                or (
                    (unit.chunk, unit.option.variant) == (first.chunk, first.option.variant)
                    and size + unit.option.num_bytes <= self.limits.transfer_bytes
                )
            ):
                units.append(unit)
                size += unit.option.num_bytes
                self.head = None
            token = self.estimator.begin(self.now, size)
            # Round trips differ a little, or equal transfers would run in step for ever and leave
            # the link idle between them.
            flows = self.now + self.limits.rtt_seconds * self.random.uniform(0.5, 1.5)
            self.transfers.append(_Transfer(units, self.now, flows, float(size), token))
            self.waiting_bytes += size
            self.outcome.num_bytes += size
            for unit in units:
                self.coming_seconds += unit.option.decode_seconds
                name = unit.option.variant
                self.outcome.variants[name] = self.outcome.variants.get(name, 0) + 1

    def _step(self) -> None:
        """To the next event."""
        rate, until_change = self.trace.at(self.now)
        flowing = [t for t in self.transfers if t.flows_from <= self.now]
        share = rate / len(flowing) if flowing else 0.0
        step = min(until_change, self.next_question - self.now)
        for transfer in self.transfers:
            if transfer.flows_from > self.now:
                step = min(step, transfer.flows_from - self.now)
            elif share > 0:
                step = min(step, transfer.bytes_left / share)
        if self.decoding:
            step = min(step, self.decoding[0][0] - self.now)
        if self.pending:
            step = min(step, self.pending[0][0] - self.now)
        if self.restoring:
            step = min(step, self.restoring[0][0] - self.now)
        step = max(step, 0.0)
        self._count_bubbles(step)
        self.now += step
        for transfer in flowing:
            transfer.bytes_left -= share * step
        for transfer in [t for t in flowing if t.bytes_left <= _EPSILON_BYTES]:
            self._arrive(transfer)
        while self.decoding and self.decoding[0][0] <= self.now:
            _, number, unit = heapq.heappop(self.decoding)
            heapq.heappush(self.pending, (self.now + self.late.pop(number), number, unit))
        while self.pending and self.pending[0][0] <= self.now:
            self._decoded(heapq.heappop(self.pending)[2])
        while self.restoring and self.restoring[0][0] <= self.now:
            self._restored(self.restoring.popleft()[1])
        self._feed()

    def _count_bubbles(self, step: float) -> None:
        if not self.transfers and not self.drawn_all:
            self.outcome.network_bubble_seconds += step
        if self.transfers or not self.drawn_all:
            idle = self.table.num_decoders - len(self.decoding)
            self.outcome.decoder_bubble_seconds += step * idle / self.table.num_decoders

    def _arrive(self, transfer: _Transfer) -> None:
        self.transfers.remove(transfer)
        self.estimator.end(transfer.token, self.now)
        for unit in transfer.units:
            self.coming_seconds -= unit.option.decode_seconds
            self.policy.transfer_done(unit, transfer.started, self.now)
            if unit.num_pictures:
                self.waiting.append(unit)
                self.waiting_seconds += unit.option.decode_seconds
            else:
                self._decoded(unit)

    def _feed(self) -> None:
        """Units to free decoders."""
        while self.waiting and len(self.decoding) < self.table.num_decoders:
            unit = self.waiting.popleft()
            self.waiting_seconds -= unit.option.decode_seconds
            busy = len(self.decoding) + 1
            each = self.table.picture_seconds(unit.load, num_busy=busy)
            occupied = unit.num_pictures * each
            latency = self.table.latency_seconds(unit.load, num_pictures=unit.num_pictures)
            self.number += 1
            heapq.heappush(self.decoding, (self.now + occupied, self.number, unit))
            # A decoder takes the next packet before the last one's picture is out.
            self.late[self.number] = max(0.0, latency - occupied)

    def _decoded(self, unit: SimUnit) -> None:
        self.waiting_bytes -= unit.option.num_bytes
        begins = self.restoring[-1][0] if self.restoring else self.now
        self.restoring.append((max(begins, self.now) + unit.option.restore_seconds, unit))

    def _restored(self, unit: SimUnit) -> None:
        left = self.layers_left.get(unit.chunk, self.num_layers) - unit.option.num_layers
        self.layers_left[unit.chunk] = left
        if unit.chunk == self.ready and left == 0:
            while self.layers_left.get(self.ready) == 0:
                self.ready += 1
            self._ask_how_much()

    def _ask_how_much(self) -> None:
        wanted = self.policy.num_wanted(self.ready, self.now, self._machine())
        self.num_wanted = max(self.ready, min(self.num_wanted, wanted))
        self.next_question = self.now + QUESTION_SECONDS


def simulate(
    policy: Policy,
    trace: Trace,
    table: DecodeTable,
    estimator: LinkEstimator,
    limits: Limits,
    *,
    start: float,
    num_chunks: int,
    num_layers: int,
) -> Outcome:
    """Fetch one prefix.

    Args:
        policy: what is fetched next, and how much.
        trace: the link.
        table: of the decoders; the truth here, and what the policy knows.
        estimator: learns from this fetch; may have learnt from others.
        limits: of the fetcher.
        start: when the fetch begins, on the trace's clock.
        num_chunks: of the prefix.
        num_layers: of a chunk, as the options of its units count them.
    """
    return _Simulation(
        policy,
        trace,
        table,
        estimator,
        limits,
        start=start,
        num_chunks=num_chunks,
        num_layers=num_layers,
    ).run()
