"""Which variant of each unit to fetch: picture sizes against bandwidth and decoders. Pure.

Small pictures decode with little latency, large ones at a higher rate (NVDEC has a cost per
picture), and their sizes differ a little; packed and raw copies are more bytes and no work for a decoder. Units
are chosen one at a time, when a transfer may start, with what is known then: the link's rate and
what waits in front of the decoders.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.fetch.planning.decode_times import AS_IN_TABLE, MIN_BITS_PER_SAMPLE, picture_load
from kvfetcher.fetch.planning.pipeline import ChunkCost
from kvfetcher.spec import LADDER, PACKED_VARIANT, RAW_VARIANT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvfetcher.fetch.planning.bandwidth import LinkEstimate
    from kvfetcher.fetch.planning.decode_times import DecodeTable, Factors
    from kvfetcher.fetch.planning.pipeline import Machine
    from kvfetcher.format.container import ChunkHeader, UnitEntry

_FRAME_SIZE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
_SAMPLES_PER_PIXEL = 3
# The stage that is not the bottleneck now may become it: its time counts with this weight.
_OTHER_STAGE = 0.05
# A raw unit costs the link several times what it spares the decoders, and is not taken back. What it
# would lose were the link to fall to this part of its rate, to its low rate, or as deep as it fell
# within the last minutes, must be less than this part of what it gains as things stand. Simulated:
# with no such rule up to 15 % lost where link and decoders are about equally fast, or the link
# stalls; without the memory of falls 7 to 9 % where a neighbour takes most of the link now and then;
# with no loss allowed at all, 14 % lost on a CPU at 1 Gbit/s (bench_fetch, `exact`).
_RAW_SLOW_PART = 0.35
_RAW_RISK = 0.4
# A packed unit costs the link a third more at most. Simulated: with 0.4 a link that has become faster is
# used late (7.7 % lost where it goes from 4 to 40 Gbit/s), with 1 decoders starve where a link of 8
# stalls (5 % lost).
_PACKED_RISK = 0.7
# Decoders with work for less than this run dry when the link stalls: there the loss is that of a fall
# to this smaller part. Simulated: without it twice as much lost where the link stalls.
_RAW_SAFE_QUEUE_SECONDS = 0.05
_RAW_SLOW_PART_HUNGRY = 0.25
# Decoders with work for longer gain nothing by more of it, but bytes that wait for them keep others from
# being asked for (`fetch.max_inflight_bytes`).
_FULL_QUEUE_SECONDS = 0.02
# Bits of an element that lie beside the video in profile `exact`.
_RAW_BITS = {"bfloat16": 8, "float16": 11, "float8_e4m3fn": 4}
# Checking and copying values as they are: bound by memory, measured on one core of a Xeon.
_RAW_ELEMENTS_PER_SECOND = 5e8


@dataclass(frozen=True, slots=True)
class UnitOption:
    """One stored unit that could be fetched for its layers, and what that costs."""

    variant: str
    layer_start: int
    num_layers: int
    num_bytes: int
    decode_seconds: float
    """Time of one decoder while all work."""
    latency_seconds: float
    """Time from the unit's last byte to its planes on an idle decoder."""
    restore_seconds: float
    restore_interval_seconds: float = 0.0
    """Of all restoring processes while they all work; 0 = not known, never the bottleneck."""

    @property
    def layer_stop(self) -> int:
        return self.layer_start + self.num_layers

    @property
    def needs_decoder(self) -> bool:
        """Whether it is video."""
        return self.decode_seconds > 0


ChunkOptions = tuple[UnitOption, ...]
"""The units of one chunk in the order of its table: every variant covers all layers."""


def chunk_options(
    header: ChunkHeader,
    table: DecodeTable,
    factors: Factors = AS_IN_TABLE,
) -> ChunkOptions:
    """The units of a stored chunk with their costs on this machine.

    Args:
        header: header of the chunk.
        table: decode times.
        factors: real times over the table's.
    """
    return tuple(_option(header, entry, table, factors) for entry in header.units)


def _option(
    header: ChunkHeader, entry: UnitEntry, table: DecodeTable, factors: Factors
) -> UnitOption:
    spec = header.spec
    elements = entry.num_layers * spec.elements_per_layer_token * header.num_tokens
    restore_seconds = factors.restore * table.restore_seconds(elements)
    restore_interval = table.restore_seconds_per_unit(elements)
    if entry.variant in (PACKED_VARIANT, RAW_VARIANT):
        if entry.variant == RAW_VARIANT:
            restore_seconds = min(
                table.restore_seconds(elements), elements / _RAW_ELEMENTS_PER_SECOND
            )
        return UnitOption(
            variant=entry.variant,
            layer_start=entry.layer_start,
            num_layers=entry.num_layers,
            num_bytes=entry.length,
            decode_seconds=0.0,
            latency_seconds=0.0,
            restore_seconds=restore_seconds,
            restore_interval_seconds=restore_interval,
        )
    bits, samples = 8 * entry.length, float(elements)
    profile = header.profile.partition("/")[0]
    if profile == "exact":
        bits = max(0, bits - elements * _RAW_BITS[spec.dtype])
    elif profile in LADDER:
        # What would nearly always be zero is not in the pictures, and the header does not say how much
        # is: so much that each sample has about two bits or more. The unit's low bits beside its video
        # count here as the decoder's (SmolLM2-135M: 5 % of a unit at `tiny`, 12 % at `balanced`, 18 %
        # at `near`).
        samples = min(samples, bits / MIN_BITS_PER_SAMPLE)
    match = _FRAME_SIZE.fullmatch(entry.variant)
    size = _SAMPLES_PER_PIXEL * math.prod(map(int, match.groups())) if match else samples
    pictures = max(1, math.ceil(samples / size))
    load = picture_load(samples / pictures, bits / pictures)
    busy = table.picture_seconds(load, num_busy=table.num_decoders)
    return UnitOption(
        variant=entry.variant,
        layer_start=entry.layer_start,
        num_layers=entry.num_layers,
        num_bytes=entry.length,
        decode_seconds=factors.decode * pictures * busy,
        latency_seconds=factors.latency * table.latency_seconds(load, num_pictures=pictures),
        restore_seconds=restore_seconds,
        restore_interval_seconds=restore_interval,
    )


class Ahead(NamedTuple):
    """Work behind the next unit."""

    num_bytes: float
    decode_seconds: float
    """Time of one decoder."""
    unit_seconds: float
    """Decoding of its last unit while all decoders work; 0 where there is none."""
    latency_seconds: float
    """Latency of its last unit on an idle decoder; 0 if there is none."""
    restore_seconds: float = 0.0
    """Time of all restoring processes."""


NOTHING_AHEAD = Ahead(0.0, 0.0, 0.0, 0.0)


class Plan(NamedTuple):
    """One way to go on after the next unit."""

    bound: Ahead
    """Units that must be of the next one's variant, because no other has a boundary before."""
    rest: Ahead
    """All that follows, in one variant."""


def choose_variant(
    options: Mapping[str, UnitOption],
    plans: Mapping[str, Sequence[Plan]],
    *,
    link: LinkEstimate,
    machine: Machine,
    current: str | None,
    hysteresis: float,
) -> str:
    """The variant of the next unit with which the fetch is predicted to be done first.

    A large picture is harmless while much is left, because others keep all decoders busy; near the
    end it is waited for. So each variant of the next unit is tried with each variant of the rest.
    Raw units spare the decoders, but only while these have enough to do, and must not risk more than
    they gain should the link slow down.

    Args:
        options: the next unit by variant.
        plans: by the next unit's variant, the ways to go on; never empty.
        link: as estimated now.
        machine: what is queued already.
        current: variant of the unit before; None for the first.
        hysteresis: another variant must gain more than this part of the time that the unit takes.
    """
    queued_bytes = machine.network_queue_bytes
    decoders = machine.num_decoders
    queue = machine.decode_queue_seconds
    rate = link.rate_for(
        queued_bytes
        + min(
            option.num_bytes + plan.bound.num_bytes + plan.rest.num_bytes
            for name, option in options.items()
            for plan in plans[name]
        )
    )

    def seconds(name: str, rate: float, *, all_coded: bool = False) -> float:
        option = options[name]
        arrived = (queued_bytes + option.num_bytes) / rate
        own = max(arrived + option.latency_seconds, max(arrived, queue) + option.decode_seconds)
        restoring = machine.restore_queue_seconds + option.restore_interval_seconds
        best = math.inf
        for bound, rest in plans[name]:
            if all_coded and rest.num_bytes and not rest.decode_seconds:
                continue
            bound_arrived = arrived + bound.num_bytes / rate
            network = bound_arrived + rest.num_bytes / rate
            last = rest if rest.num_bytes else bound
            work = option.decode_seconds + bound.decode_seconds + rest.decode_seconds
            # Decoders that run out of work while this is on the link wait for what comes then.
            free = max(queue, arrived if option.decode_seconds else bound_arrived)
            # The decoders do not finish together: the last unit is waited for.
            decode = free + work / decoders + last.unit_seconds * (decoders - 1) / decoders
            restore = restoring + bound.restore_seconds + rest.restore_seconds
            done = max(network + last.latency_seconds, decode if work else 0.0, own, restore)
            best = min(best, done + _OTHER_STAGE * min(network, decode))
        return best

    # A link that may be faster than it seems makes the decoders the bottleneck.
    fast = max(rate, link.high_bytes_per_second)

    def cost(name: str, *, all_coded: bool = False) -> float:
        return sum(seconds(name, r, all_coded=all_coded) for r in (rate, fast)) / 2

    costs = {name: cost(name) for name in options}
    coded = [name for name, option in options.items() if option.decode_seconds]
    if coded and len(coded) < len(options):
        is_safe = queue > _RAW_SAFE_QUEUE_SECONDS
        slow_part = _RAW_SLOW_PART if is_safe else _RAW_SLOW_PART_HUNGRY
        slow = min(min(slow_part, link.fallen_to) * rate, link.low_bytes_per_second)

        def gain(name: str, rate: float) -> float:
            """Over fetching all the rest coded."""
            return min(seconds(n, rate, all_coded=True) for n in coded) - seconds(name, rate)

        def risk(name: str) -> float:
            return _PACKED_RISK if name == PACKED_VARIANT else _RAW_RISK

        costs = {
            name: cost
            for name, cost in costs.items()
            if name in coded or gain(name, slow) + risk(name) * max(0.0, gain(name, rate)) > 0
        }
        if len(costs) == len(coded):
            # What is too risky now is not to be counted on later: with all the rest raw, small
            # pictures seem best, unit after unit.
            costs = {name: cost(name, all_coded=True) for name in coded}
        elif queue > _FULL_QUEUE_SECONDS and min(costs[n] for n in coded) < min(
            cost(n, all_coded=True) for n in coded
        ):
            # Copies will be fetched in any case: now, while the decoders have enough to do.
            costs = {name: cost for name, cost in costs.items() if name not in coded}
    chosen = min(costs, key=lambda name: (costs[name], name))
    if current is None or current not in costs:
        return chosen
    # Of the unit's own time: one unit of many changes the whole by little, whichever it is.
    unit = options[current]
    margin = hysteresis * max(unit.num_bytes / rate, unit.decode_seconds / decoders)
    return current if costs[current] - costs[chosen] <= margin else chosen


class UnitWalk:
    """Hands out the units of a fetch one at a time, each in the variant that is best then.

    Chunk after chunk, layers bottom up; every layer of every chunk exactly once. Where variants cut
    the layers differently, a change waits for a boundary that both have. Not thread-safe.
    """

    def __init__(self, chunks: Sequence[ChunkOptions], *, hysteresis: float) -> None:
        """A walk over all layers of `chunks`.

        Args:
            chunks: from the first that is fetched on; each with one or more variants.
            hysteresis: see `choose_variant`.
        """
        self._chunks = list(chunks)
        self._hysteresis = hysteresis
        self._num_layers = [max(option.layer_stop for option in chunk) for chunk in self._chunks]
        self._totals = [_totals(chunk) for chunk in self._chunks]
        self._starting = [_by_start(chunk) for chunk in self._chunks]
        self._behind = self._sums_behind()
        self._chunk = 0
        self._layer = 0
        self._current: str | None = None
        # Of the chunk in hand, by variant and layer of the next unit.
        self._plans_of: dict[tuple[str, int], list[Plan]] = {}

    @property
    def num_chunks(self) -> int:
        """Chunks that the walk covers."""
        return len(self._chunks)

    def truncate(self, num_chunks: int) -> None:
        """Leave out the chunks from `num_chunks` on; those handed out already stay so."""
        for per_chunk in (self._chunks, self._num_layers, self._totals, self._starting):
            del per_chunk[num_chunks:]
        self._behind = self._sums_behind()
        self._plans_of = {}

    def start(self, *, link: LinkEstimate, machine: Machine) -> None:
        """Choose the variant to begin with, so that `costs` are of it before the first unit.

        Where one variant is slow to decode and another slow to transfer (a raw copy), no variant's
        costs stand for all.
        """

        def seconds(name: str) -> float:
            whole = _plus(self._totals[0][name], self._behind[0][name])
            num_bytes = machine.network_queue_bytes + whole.num_bytes
            network = num_bytes / link.rate_for(num_bytes) + whole.latency_seconds
            decode = machine.decode_queue_seconds + whole.decode_seconds / machine.num_decoders
            return max(network, decode)

        self._current = min(self._totals[0], key=lambda name: (seconds(name), name))

    def next(self, *, link: LinkEstimate, machine: Machine) -> tuple[int, UnitOption] | None:
        """The next unit and the index of its chunk; None when all are handed out.

        Args:
            link: as estimated now.
            machine: what is queued now, the units handed out before included.
        """
        if self._chunk >= len(self._chunks):
            return None
        here = self._starting[self._chunk][self._layer]
        self._current = choose_variant(
            here,
            {name: self._plans(option) for name, option in here.items()},
            link=link,
            machine=machine,
            current=self._current,
            hysteresis=self._hysteresis,
        )
        index, option = self._chunk, here[self._current]
        self._layer = option.layer_stop
        if self._layer == self._num_layers[index]:
            self._chunk, self._layer = index + 1, 0
            self._plans_of = {}
        return index, option

    def costs(self, first_chunk: int = 0) -> list[ChunkCost]:
        """What is not handed out yet of each chunk from `first_chunk` on.

        In the variant in use; before `start` and the first unit, in the one that decodes quickest.
        """
        return [self._cost(index) for index in range(first_chunk, len(self._chunks))]

    def _cost(self, index: int) -> ChunkCost:
        totals = self._totals[index]
        name = self._current
        if name is None or name not in totals:
            name = min(totals, key=lambda n: (totals[n].decode_seconds, n))
        if index < self._chunk:
            share = 0.0
        else:
            done = self._layer if index == self._chunk else 0
            share = 1 - done / self._num_layers[index]
        total = totals[name]
        restore = sum(o.restore_seconds for o in self._chunks[index] if o.variant == name)
        return ChunkCost(
            round(share * total.num_bytes),
            share * total.decode_seconds,
            total.latency_seconds,
            share * restore,
        )

    def _plans(self, option: UnitOption) -> list[Plan]:
        """The ways to go on after a unit of the chunk in hand: each variant, once it has a boundary."""
        key = (option.variant, option.layer_start)
        if key not in self._plans_of:
            self._plans_of[key] = [self._plan(option, name) for name in self._totals[self._chunk]]
        return self._plans_of[key]

    def _plan(self, option: UnitOption, then: str) -> Plan:
        starting, num_layers = self._starting[self._chunk], self._num_layers[self._chunk]
        bound, layer = NOTHING_AHEAD, option.layer_stop
        while layer < num_layers and then not in starting[layer]:
            unit = starting[layer][option.variant]
            bound, layer = _plus(bound, _work(unit)), unit.layer_stop
        total = self._totals[self._chunk][then]
        rest = _part(total, 1 - layer / num_layers)
        return Plan(bound, _plus(rest, self._behind[self._chunk][then]))

    def _sums_behind(self) -> list[dict[str, Ahead]]:
        """What all chunks behind each chunk cost, by variant.

        Where a chunk lacks a variant, the one of its own that decodes quickest stands in.
        """
        behind: list[dict[str, Ahead]] = []
        after: dict[str, Ahead] = {}
        names = {name for totals in self._totals for name in totals}
        for totals in reversed(self._totals):
            behind.append({name: after.get(name, NOTHING_AHEAD) for name in totals})
            quickest = min(totals.values(), key=lambda total: total.decode_seconds)
            after = {
                name: _plus(totals.get(name, quickest), after.get(name, NOTHING_AHEAD))
                for name in names
            }
        behind.reverse()
        return behind


def _work(unit: UnitOption) -> Ahead:
    return Ahead(
        unit.num_bytes,
        unit.decode_seconds,
        unit.decode_seconds,
        unit.latency_seconds,
        unit.restore_interval_seconds,
    )


def _plus(first: Ahead, then: Ahead) -> Ahead:
    last = then if then.num_bytes else first
    return Ahead(
        first.num_bytes + then.num_bytes,
        first.decode_seconds + then.decode_seconds,
        last.unit_seconds,
        last.latency_seconds,
        first.restore_seconds + then.restore_seconds,
    )


def _part(work: Ahead, share: float) -> Ahead:
    if share <= 0:
        return NOTHING_AHEAD
    return work._replace(
        num_bytes=share * work.num_bytes,
        decode_seconds=share * work.decode_seconds,
        restore_seconds=share * work.restore_seconds,
    )


def _totals(chunk: ChunkOptions) -> dict[str, Ahead]:
    totals: dict[str, Ahead] = {}
    for option in chunk:
        before = totals.get(option.variant, NOTHING_AHEAD)
        totals[option.variant] = _plus(before, _work(option))
    return totals


def _by_start(chunk: ChunkOptions) -> dict[int, dict[str, UnitOption]]:
    """Units by the layer that they start with, then by variant."""
    found: dict[int, dict[str, UnitOption]] = {}
    for option in chunk:
        found.setdefault(option.layer_start, {})[option.variant] = option
    return found
