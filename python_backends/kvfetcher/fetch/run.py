"""The units of one fetch, running through transfer, decode and restore side by side.

A feeder asks for the next units as soon as a read may start and there is room for their bytes; each
read then goes on by itself. A chunk that fails or is given up ends the run there: what comes behind
is cancelled, what came before is kept. One event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvfetcher.errors import FormatError, TransientStoreError
from kvfetcher.fetch.planning.gate import reconsider
from kvfetcher.fetch.planning.pipeline import ChunkCost, finish_times
from kvfetcher.fetch.stages import Backlog
from kvfetcher.format import container
from kvfetcher.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from kvfetcher.fetch.learning import UnitStatus
    from kvfetcher.fetch.planning.bandwidth import LinkEstimate
    from kvfetcher.fetch.planning.gate import Prompt
    from kvfetcher.fetch.planning.variants import UnitOption
    from kvfetcher.fetch.report import Reason, RunFacts
    from kvfetcher.fetch.stages import Stages
    from kvfetcher.format.container import ChunkHeader, UnitEntry
    from kvfetcher.memory.arena import BlockTarget

# How often a run looks at the time and asks again whether going on is worth it.
_LOOK_SECONDS = 0.05
# Digests of more bytes take over a millisecond: not in the event loop.
_THREAD_BYTES = 1 << 20
_ROUNDING = 1e-9
# A run that does not move for so long, for so many times what its next step should take, and for
# this part of what computing the rest takes, is stuck: half a minute's patience is not worth a
# prefill of two seconds.
_MIN_STALL_SECONDS = 0.2
_STALL_SLACK = 4.0
_STALL_SHARE = 0.25

OnFailure = Callable[[str, BaseException], tuple["Reason", str]]
"""Object name and exception -> why the run ends there (`Failures.note`)."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk that the store holds."""

    name: str
    header: ChunkHeader
    is_local: bool = False
    """Copies on this host hold all of it, so that reading it takes nothing of the link."""

    def priced(self, cost: ChunkCost) -> ChunkCost:
        """What it costs, of what it would cost over the link."""
        return replace(cost, num_bytes=0) if self.is_local else cost


@dataclass(eq=False, slots=True)
class _Group:
    """Neighbouring units of one chunk, read together."""

    chunk_index: int
    options: list[UnitOption]
    entries: list[UnitEntry]
    share: float
    """Share of the chunk's layers, 0 to 1."""
    has_slot: bool = False
    """Whether it has one of the slots for reads."""
    has_arrived: bool = False
    undone: Backlog = field(default_factory=Backlog)
    """What of its units is not decoded and restored."""

    @property
    def start(self) -> int:
        return self.entries[0].offset

    @property
    def stop(self) -> int:
        return self.entries[-1].stop

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class ChunkRun:
    """Brings chunks into leased blocks. Make it inside a task; call `finish` once.

    Args:
        stages: shared with all other runs.
        chunks: consecutive, from position 0.
        target: leased blocks for the tokens of all chunks.
        tokens_per_block: tokens per block of the engine.
        facts: filled in.
        on_failure: see `OnFailure`.
        hysteresis: hysteresis of the choice of variants.
        prompt: what would be computed instead; None = never ask again whether it is worth it.
        margin: see `gate.reconsider`.
    """

    def __init__(
        self,
        stages: Stages,
        chunks: Sequence[StoredChunk],
        target: BlockTarget,
        *,
        tokens_per_block: int,
        facts: RunFacts,
        on_failure: OnFailure,
        hysteresis: float,
        prompt: Prompt | None,
        margin: float,
    ) -> None:
        self._stages = stages
        self._chunks = list(chunks)
        self._target = target
        self._tokens_per_block = tokens_per_block
        self._facts = facts
        self._on_failure = on_failure
        self._prompt = prompt
        self._margin = margin
        self._number = next(stages.run_numbers)
        self._factors = stages.learning.factors
        headers = (chunk.header for chunk in self._chunks)
        self._walk = stages.walk(headers, self._factors, hysteresis=hysteresis)
        self._walk.start(link=stages.link(), machine=stages.machine(with_planned=False))
        self._costs = [
            chunk.priced(cost) for chunk, cost in zip(self._chunks, self._walk.costs(), strict=True)
        ]
        self._entries = [
            {(entry.variant, entry.layer_start): entry for entry in chunk.header.units}
            for chunk in self._chunks
        ]
        self._held: tuple[int, UnitOption] | None = None
        self._unrequested = [1.0] * len(self._chunks)  # share of each chunk's layers
        self._end = len(self._chunks)  # chunks from here on are given up
        self._groups: dict[asyncio.Task[None], _Group] = {}
        self._cancelled: set[asyncio.Task[None]] = set()
        self._progress = 0  # reads that came and units that were restored
        self._seen_progress = -1
        self._progress_at = stages.clock()
        self._expected_seconds = 0.0

    @property
    def is_live(self) -> bool:
        """Whether a decoder may still write to the blocks."""
        return any(not task.done() for task in self._groups)

    def remaining(self) -> list[ChunkCost]:
        """What the chunks that are not ready still cost, in order."""
        open_groups = [g for task, g in self._groups.items() if not task.done()]
        result = []
        for index in range(self._num_ready(), self._end):
            cost, share = self._costs[index], self._unrequested[index]
            mine = [group for group in open_groups if group.chunk_index == index]
            result.append(
                ChunkCost(
                    num_bytes=int(share * cost.num_bytes)
                    + sum(group.num_bytes for group in mine if not group.has_arrived),
                    decode_seconds=share * cost.decode_seconds
                    + sum(group.undone.decode_seconds for group in mine),
                    tail_seconds=cost.tail_seconds,
                    restore_seconds=cost.restore_seconds
                    * (share + sum(group.share for group in mine)),
                )
            )
        return result

    async def finish(self, deadline: Callable[[int], float]) -> int:
        """Run; the number of whole chunks from position 0 on.

        Returns once nothing is pending, or a little after the deadline: see `is_live`.

        Args:
            deadline: for a number of whole chunks that are ready, when to end with these; on the
                stages' clock, asked again and again.
        """
        self._stages.planned.add(self._planned(range(self._end)))
        feeder = asyncio.create_task(self._feed())
        try:
            await self._watch(feeder, deadline)
        except BaseException:
            self._cancel_from(0)
            raise
        finally:
            feeder.cancel()
            self._stages.planned.remove(self._planned(range(len(self._chunks))))
        return self._end

    async def drained(self) -> None:
        """Return when no unit of this run can write any more."""
        await asyncio.gather(*self._groups, return_exceptions=True)

    async def _watch(self, feeder: asyncio.Task[None], deadline: Callable[[int], float]) -> None:
        seen: set[asyncio.Task[None]] = set()
        clock = self._stages.clock
        looked = started = clock()
        while True:
            if not any(self._unrequested[: self._end]):
                feeder.cancel()  # it may wait behind others for room that it needs no more
            pending = {task for task in (feeder, *self._groups) if not task.done()}
            if pending:
                await asyncio.wait(
                    pending, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            if feeder.done() and not feeder.cancelled():
                feeder.result()
            for task in [t for t in self._groups if t.done() and t not in seen]:
                seen.add(task)
                if not task.cancelled() and (exc := task.exception()) is not None:
                    self._fail(self._groups[task], exc)
            if not pending:
                return
            now = clock()
            until = deadline(self._num_ready())
            if now >= until:
                await self._give_up_late(until - started)
                return
            if now - looked >= _LOOK_SECONDS:
                looked = now
                self._reconsider()

    async def _give_up_late(self, allowed_seconds: float) -> None:
        """At the deadline: keep what is whole, and give running decoders a moment to end."""
        ready = self._num_ready()
        self._facts.end("deadline", f"{self._end - ready} chunks were not restored in time")
        self._cancel_from(ready)
        live = [task for task in self._groups if not task.done()]
        if live:
            await asyncio.wait(live, timeout=max(0.05, 0.1 * allowed_seconds))

    def _reconsider(self) -> None:
        """End the run where computing the rest has become faster than going on."""
        if self._prompt is None or not self._end:
            return
        ready = self._num_ready()
        remaining = self._remaining_seconds()
        now = self._stages.clock()
        if self._progress != self._seen_progress:
            self._seen_progress, self._progress_at = self._progress, now
            self._expected_seconds = remaining[0] if remaining else 0.0
        wanted = reconsider(
            remaining, self._prompt, num_ready=ready, num_wanted=self._end, margin=self._margin
        )
        # Where nothing moves at all, predictions from what moved before say nothing.
        silent = now - self._progress_at
        rest = self._prompt.compute_seconds(ready) - self._prompt.compute_seconds(self._end)
        if silent > max(
            _MIN_STALL_SECONDS, _STALL_SLACK * self._expected_seconds, _STALL_SHARE * rest
        ):
            wanted = ready
        if wanted < self._end:
            self._facts.end(
                "fell_behind",
                f"computing chunks {wanted} to {self._end - 1} became faster than fetching them",
            )
            self._cancel_from(wanted)

    def _remaining_seconds(self) -> list[float]:
        """Seconds from now until each chunk that is not ready is restored."""
        link = self._stages.link()
        mine = self._outstanding()
        return finish_times(
            self.remaining(),
            link=link,
            machine=self._stages.machine(with_planned=False, without=mine),
        )

    def _num_ready(self) -> int:
        """Whole chunks from position 0 on."""
        unfinished = [g.chunk_index for task, g in self._groups.items() if not _is_good(task)]
        unfinished += [i for i in range(self._end) if self._unrequested[i] > 0][:1]
        return min([self._end, *unfinished])

    # Requesting

    async def _feed(self) -> None:
        budget = self._stages.budget
        while (group := self._next_group()) is not None:
            await self._take_slot(group)
            is_taken = is_started = False
            try:
                await budget.take(group.num_bytes)
                is_taken = True
                if group.chunk_index >= self._end:
                    return
                self._start(group)
                is_started = True
            finally:
                if not is_started:
                    if is_taken:
                        budget.give(group.num_bytes)
                    self._give_slot(group)

    async def _take_slot(self, group: _Group) -> None:
        """Wait until a read may start; one that another run makes already is joined at once."""
        await asyncio.sleep(0)  # reads that another run has just asked for begin meanwhile
        if not self._stages.reads.is_reading(self._range(group)):
            await self._stages.read_queue.take(group.num_bytes)
            group.has_slot = True

    def _give_slot(self, group: _Group) -> None:
        if group.has_slot:
            group.has_slot = False
            self._stages.read_queue.give(group.num_bytes)

    def _range(self, group: _Group) -> ByteRange:
        return ByteRange(self._chunks[group.chunk_index].name, group.start, group.stop)

    def _next_group(self) -> _Group | None:
        link = self._stages.link()
        left = self._planned(range(self._end)).num_bytes
        limit = self._stages.read_bytes(link, left_bytes=left)
        unit = self._held or self._next_unit(link)
        if unit is None:
            return None
        index, option = unit
        options, entries = [option], [self._entries[index][option.variant, option.layer_start]]
        num_bytes = entries[0].length
        while (unit := self._next_unit(link)) is not None:
            next_index, option = unit
            entry = self._entries[next_index][option.variant, option.layer_start]
            num_bytes += entry.length
            if next_index != index or entry.offset != entries[-1].stop or num_bytes > limit:
                break
            options.append(option)
            entries.append(entry)
        self._held = unit
        num_layers = self._chunks[index].header.spec.num_layers
        return _Group(index, options, entries, sum(o.num_layers for o in options) / num_layers)

    def _next_unit(self, link: LinkEstimate) -> tuple[int, UnitOption] | None:
        return self._walk.next(link=link, machine=self._stages.machine(with_planned=False))

    def _start(self, group: _Group) -> None:
        index = group.chunk_index
        stages = self._stages
        stages.planned.remove(self._planned([index]))
        left = self._unrequested[index] - group.share
        self._unrequested[index] = left if left > _ROUNDING else 0.0
        stages.planned.add(self._planned([index]))
        for option in group.options:
            group.undone.add(_work_of(option))
        stages.requested.add(Backlog(group.num_bytes))
        stages.requested.add(group.undone)
        task = asyncio.create_task(self._carry_out(group))
        # Not in the task itself: one that is cancelled before it began runs no line of its own.
        task.add_done_callback(lambda _: self._end_group(group))
        self._groups[task] = group

    def _end_transfer(self, group: _Group) -> None:
        if not group.has_arrived:
            group.has_arrived = True
            self._stages.requested.num_bytes -= group.num_bytes
            self._give_slot(group)

    def _end_group(self, group: _Group) -> None:
        self._end_transfer(group)
        self._stages.budget.give(group.num_bytes)
        self._stages.requested.remove(group.undone)
        group.undone = Backlog()

    def _planned(self, indices: Sequence[int]) -> Backlog:
        """What is not requested yet of some chunks."""
        return Backlog(
            sum(int(self._unrequested[i] * self._costs[i].num_bytes) for i in indices),
            sum(self._unrequested[i] * self._costs[i].decode_seconds for i in indices),
        )

    def _outstanding(self) -> Backlog:
        """What is requested of this run and not done."""
        groups = [group for task, group in self._groups.items() if not task.done()]
        return Backlog(
            sum(group.num_bytes for group in groups if not group.has_arrived),
            sum(group.undone.decode_seconds for group in groups),
        )

    # One group

    async def _carry_out(self, group: _Group) -> None:
        try:
            data = await self._transfer(group)
        finally:
            self._end_transfer(group)
        self._progress += 1
        ends = await asyncio.gather(
            *(
                self._decode(group, option, entry, data)
                for option, entry in zip(group.options, group.entries, strict=True)
            ),
            return_exceptions=True,  # so that none is left running behind
        )
        for failure in ends:
            if failure is not None:
                raise failure

    async def _transfer(self, group: _Group) -> bytes:
        """The group's bytes, checked. A read that came damaged is repeated once.

        Raises:
            FormatError: the store's copy is damaged, not only the way here.
            TransientStoreError: the reads were cut short, the object is not.
            StoreError: the store's.
        """
        data = await self._read(group)
        try:
            await self._check(group, data)
        except FormatError:
            data = await self._read(group)
            if len(data) < group.num_bytes:
                await self._check_length(group)
            await self._check(group, data)
        return data

    async def _read(self, group: _Group) -> bytes:
        started = self._stages.clock()
        try:
            return await self._stages.reads.read(self._range(group), self._facts.tally)
        finally:
            self._facts.add_ms("transfer", self._stages.clock() - started)

    async def _check(self, group: _Group, data: bytes) -> None:
        header = self._chunks[group.chunk_index].header

        def check() -> None:
            for entry in group.entries:
                first = entry.offset - group.start
                container.check_unit(header, entry, memoryview(data)[first : first + entry.length])

        if len(data) < _THREAD_BYTES:
            check()
        else:
            await asyncio.to_thread(check)

    async def _check_length(self, group: _Group) -> None:
        chunk = self._chunks[group.chunk_index]
        tail = await self._stages.reads.read(
            ByteRange(chunk.name, chunk.header.object_bytes - 1, chunk.header.object_bytes),
            self._facts.tally,
        )
        if tail:
            raise TransientStoreError(
                f"reading bytes {group.start} to {group.stop} of {chunk.name} ended early twice,"
                " although the object is longer; is something between here and the store broken?"
            )

    async def _decode(
        self, group: _Group, option: UnitOption, entry: UnitEntry, data: bytes
    ) -> None:
        stages, facts = self._stages, self._facts
        first = entry.offset - group.start
        # Whatever arrived first: earlier runs, and the chunks that a shorter hit would keep, go
        # first.
        slots = stages.unit_slots if option.needs_decoder else stages.copy_slots
        async with slots.hold((self._number, group.chunk_index, option.layer_start)):
            unit = data[first : first + entry.length]
            running = _finish_even_if_cancelled(
                stages.run_unit(unit, self._part(group.chunk_index))
            )
            status = await (self._learn_of(option, running) if option.needs_decoder else running)
        self._progress += 1
        work = _work_of(option)
        group.undone.remove(work)
        stages.requested.remove(work)
        facts.num_units += 1
        facts.decoders[status.decoder] = facts.decoders.get(status.decoder, 0) + 1
        facts.variants[entry.variant] = facts.variants.get(entry.variant, 0) + 1
        facts.add_ms("decode", status.decode_ms / 1e3)
        facts.add_ms("restore", status.restore_ms / 1e3)

    async def _learn_of(self, option: UnitOption, running: Awaitable[UnitStatus]) -> UnitStatus:
        """Await a unit that needs a decoder, and learn what it takes."""
        stages = self._stages
        stages.learning.begin()
        try:
            status = await running
        except BaseException:
            stages.learning.drop()
            raise
        stages.learning.end(option, self._factors, status, stages.clock())
        return status

    def _part(self, chunk_index: int) -> BlockTarget:
        tokens = self._chunks[chunk_index].header.num_tokens
        return self._target.span(
            chunk_index * tokens, tokens, tokens_per_block=self._tokens_per_block
        )

    # Ending

    def _fail(self, group: _Group, exc: BaseException) -> None:
        if group.chunk_index < self._end:
            self._cancel_from(group.chunk_index)
            reason, detail = self._on_failure(self._chunks[group.chunk_index].name, exc)
            self._facts.end(reason, detail)

    def _cancel_from(self, chunk_index: int) -> None:
        self._end = min(self._end, chunk_index)
        self._walk.truncate(self._end)
        if self._held is not None and self._held[0] >= self._end:
            self._held = None
        for task, group in self._groups.items():
            if group.chunk_index >= self._end and task not in self._cancelled:
                self._cancelled.add(task)  # once only: a second cancel would end its draining
                task.cancel()


def _work_of(option: UnitOption) -> Backlog:
    """What a unit is for the stages behind its transfer."""
    return Backlog(0, option.decode_seconds, option.restore_interval_seconds)


def _is_good(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


async def _finish_even_if_cancelled(unit: Awaitable[UnitStatus]) -> UnitStatus:
    """Await a unit that has reached a decoder.

    Cancelled, it still waits for the decoder before it ends, because until then the decoder may
    write to the unit's blocks.
    """
    running = asyncio.ensure_future(unit)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
