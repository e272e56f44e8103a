"""The fetcher over a simulated link and simulated decoders, on a clock that jumps.

What decides, reads, waits and gives up is `fetch.Fetcher` itself with everything behind it; only the
clock, the store, the decoders and the engine's leases are made up here, and units have no digests to
check. The link is shared evenly by the transfers whose round trip has passed; decoders take units
first come, first served, each at the table's rate for the number that work; restoring is one stage
behind them.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np

from kvfetcher.fetch.engine_side import EngineThroughput, FetchFacts
from kvfetcher.fetch.fetcher import Fetcher
from kvfetcher.fetch.learning import UnitStatus
from kvfetcher.fetch.lookup import Found
from kvfetcher.fetch.planning.plan import probe_batches
from kvfetcher.fetch.planning.variants import chunk_options
from kvfetcher.fetch.run import ChunkRun, StoredChunk
from kvfetcher.fetch.work import FetchOrder, FetchWork
from kvfetcher.format.container import HEADER_READ_BYTES, ChunkHeader, UnitEntry
from kvfetcher.memory.arena import BlockTarget
from kvfetcher.prefill_rate import PrefillModel
from kvfetcher.spec import KVSpec
from kvfetcher.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from numpy.typing import NDArray

    from kvfetcher.bench.traces import Trace
    from kvfetcher.config import FetchConfig
    from kvfetcher.errors import StoreError
    from kvfetcher.fetch.planning.decode_times import DecodeTable
    from kvfetcher.fetch.planning.variants import ChunkOptions, UnitWalk
    from kvfetcher.fetch.report import FetchReport, RunFacts
    from kvfetcher.fetch.run import _Group
    from kvfetcher.storage.base import Store

CHUNK_TOKENS = 256
_TOKENS_PER_BLOCK = 64
_DIGEST = bytes(32)
_EPSILON_BYTES = 16.0
_GAP_SECONDS = 0.01


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: the clock jumps to when the loop would wake."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that never comes")
        self.now += max(0.0, timeout)
        return []


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop on simulated time. Threads and sockets do not work on it."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def run_simulated(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What `work()` returns, run on a clock of its own."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work())


@dataclass(eq=False, slots=True)
class _Transfer:
    bytes_left: float
    done: asyncio.Future[None]


class SimLink:
    """The link: `transfer` takes as long as it would.

    Args:
        trace: its rate.
        rtt_seconds: from a request to its first byte, more or less.
    """

    def __init__(self, trace: Trace, *, rtt_seconds: float) -> None:
        self._trace = trace
        self._rtt_seconds = rtt_seconds
        self._loop = asyncio.get_running_loop()
        self._random = random.Random(0)
        self._flowing: list[_Transfer] = []
        self._share = 0.0
        self._at = self._loop.time()
        self._wake: asyncio.TimerHandle | None = None
        self._num_asked = 0
        self._asked_at = 0.0
        self.trace_starts = 0.0
        """When the trace began, on the loop's clock."""
        self.busy_seconds = 0.0
        """With something asked for."""
        self.idle_since = 0.0
        """The last transfer's end."""

    async def transfer(self, num_bytes: int) -> None:
        """Return when `num_bytes` have come."""
        if not self._num_asked:
            self._asked_at = self._loop.time()
        self._num_asked += 1
        moving = _Transfer(float(num_bytes), self._loop.create_future())
        try:
            # Round trips differ a little, or equal transfers would run in step for ever and leave
            # the link idle between them.
            await asyncio.sleep(self._rtt_seconds * self._random.uniform(0.5, 1.5))
            self._advance()
            self._flowing.append(moving)
            self._plan()
            await moving.done
        finally:
            if moving in self._flowing:
                self._advance()
                self._flowing.remove(moving)
                self._plan()
            self._num_asked -= 1
            self.idle_since = self._loop.time()
            if not self._num_asked:
                self.busy_seconds += self.idle_since - self._asked_at

    def _advance(self) -> None:
        now = self._loop.time()
        moved = self._share * (now - self._at)
        self._at = now
        for transfer in self._flowing:
            transfer.bytes_left -= moved

    def _plan(self) -> None:
        """Wake when a transfer ends or the rate changes."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if not self._flowing:
            self._share = 0.0
            return
        rate, seconds = self._trace.at(self._at - self.trace_starts)
        self._share = rate / len(self._flowing)
        if self._share:
            left = min(transfer.bytes_left for transfer in self._flowing)
            seconds = min(seconds, left / self._share)
        self._wake = self._loop.call_at(self._at + max(seconds, 1e-9), self._woken)

    def _woken(self) -> None:
        self._advance()
        for transfer in [t for t in self._flowing if t.bytes_left <= _EPSILON_BYTES]:
            self._flowing.remove(transfer)
            if not transfer.done.done():
                transfer.done.set_result(None)
        self._plan()


class _Span(bytes):
    """Bytes `start` to `stop` of an object, of which only the place is known."""

    name: str
    start: int
    stop: int

    @classmethod
    def of(cls, name: str, start: int, stop: int) -> Self:
        made = cls()
        made.name, made.start, made.stop = name, start, stop
        return made

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: Any) -> Any:
        return self.of(self.name, self.start + part.start, self.start + part.stop)


class _Store:
    """Every object is there, at the other end of the link."""

    def __init__(self, link: SimLink) -> None:
        self._link = link

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        await self._link.transfer(end - start)
        return _Span.of(name, start, end)

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        await self._link.transfer(sum(part.end - part.start for part in ranges))
        return [_Span.of(*part) for part in ranges]


@dataclass(frozen=True, slots=True)
class UnitWork:
    """What a unit really asks of decoders and restorer."""

    load: float
    """`picture_load` of one picture."""
    num_pictures: int
    """0 = not video, needs no decoder."""
    restore_seconds: float


class _Decoders:
    """`RunUnit` with the table's times.

    Args:
        table: the truth here.
        work_of: of a unit, by object name and first byte.
    """

    def __init__(self, table: DecodeTable, work_of: Callable[[str, int], UnitWork]) -> None:
        self._table = table
        self._work_of = work_of
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(table.num_decoders)
        self._num_busy = 0
        self._restored = 0.0
        self._busy_seconds = 0.0
        self._at = 0.0
        self.at_arrival = 0.0
        """`busy_seconds` when a unit last came."""

    def busy_seconds(self) -> float:
        """Time for which all decoders together worked until now."""
        now = self._loop.time()
        self._busy_seconds += (now - self._at) * self._num_busy
        self._at = now
        return self._busy_seconds

    async def __call__(self, unit: bytes, target: BlockTarget) -> UnitStatus:
        span = cast("_Span", unit)
        work = self._work_of(span.name, span.start)
        self.at_arrival = self.busy_seconds()
        seconds = await self._decode(work) if work.num_pictures else 0.0
        decoded = self._loop.time()
        self._restored = max(decoded, self._restored) + work.restore_seconds
        await asyncio.sleep(self._restored - decoded)
        return UnitStatus("nvdec", 1e3 * seconds, 1e3 * work.restore_seconds)

    async def _decode(self, work: UnitWork) -> float:
        """Returns what it took, not counting what it waited for a decoder."""
        async with self._free:
            self.busy_seconds()
            self._num_busy += 1
            each = self._table.picture_seconds(work.load, num_busy=self._num_busy)
            occupied = work.num_pictures * each
            await asyncio.sleep(occupied)
            self.busy_seconds()
            self._num_busy -= 1
        # A decoder takes the next packet before the last one's picture is out.
        latency = self._table.latency_seconds(work.load, num_pictures=work.num_pictures)
        await asyncio.sleep(max(0.0, latency - occupied))
        return max(latency, occupied)


_FACTS = FetchFacts(
    identity_digest=_DIGEST,
    chunk_tokens=CHUNK_TOKENS,
    tokens_per_block=_TOKENS_PER_BLOCK,
    spec=KVSpec(num_layers=1, num_kv_heads=1, head_dim=1),
    max_prompt_tokens=1 << 20,
)


class _Leases:
    """An engine whose arena is never full."""

    def __init__(self) -> None:
        self._numbers = count()

    async def facts(self) -> FetchFacts:
        return _FACTS

    async def throughput(self) -> EngineThroughput:
        # Each prompt has a prefill rate of its own, see `SimFetcher`.
        return EngineThroughput(PrefillModel(1.0, 0.0), _FACTS.max_prompt_tokens)

    async def lease(self, num_tokens: int, ttl_seconds: float) -> tuple[str, BlockTarget]:
        blocks = tuple(range(-(-num_tokens // _TOKENS_PER_BLOCK)))
        return str(next(self._numbers)), BlockTarget("1", blocks, num_tokens)

    async def seal(self, *_: Any, **__: Any) -> None: ...

    async def share(self, lease_id: str) -> None: ...

    async def renew(self, lease_id: str) -> None: ...

    async def release(self, lease_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class SimPrompt:
    """A prompt whose prefix is stored."""

    prefix_tokens: int
    suffix_tokens: int
    prefill: PrefillModel
    header: ChunkHeader
    """Header of each of its chunks."""
    works: dict[int, UnitWork]
    """Work of each unit, by the offset of its first byte."""


@dataclass(slots=True)
class Outcome:
    """What a simulated request's fetch did; times in seconds."""

    fetch_seconds: float = 0.0
    """Look-up, decision and fetch, until computing begins."""
    num_chunks: int = 0
    """Restored, from the first."""
    num_bytes: int = 0
    network_bubble_seconds: float = 0.0
    """Nothing was asked of the link, although more was still to come."""
    decoder_bubble_seconds: float = 0.0
    """Decoders were free while units were still on their way, per decoder."""
    variants: dict[str, int] = field(default_factory=dict)
    report: FetchReport | None = None


class Walk(Protocol):
    """Another order of units than the fetcher's own: a `UnitWalk` that hears what arrives."""

    def arrived(self, chunk: int, num_bytes: int, started: float, finished: float) -> None:
        """A read of a chunk's units was made."""


Rewalk = Callable[[list["ChunkOptions"]], "Walk"]


class _Run(ChunkRun):
    """A run whose units have no digests, and may be walked through in another order."""

    _other: Walk | None = None

    def walk_by(self, rewalk: Rewalk) -> None:
        """Take another order of units, before the run begins."""
        table = self._stages.table
        self._other = rewalk(
            [chunk_options(chunk.header, table, self._factors) for chunk in self._chunks]
        )
        self._walk = cast("UnitWalk", self._other)

    async def _check(self, group: _Group, data: bytes) -> None: ...

    async def _read(self, group: _Group) -> bytes:
        started = self._stages.clock()
        data = await super()._read(group)
        if self._other is not None:
            now = self._stages.clock()
            self._other.arrived(group.chunk_index, group.num_bytes, started, now)
        return data


class _Work(FetchWork):
    """Carries fetches out with `_Run`."""

    run_type = _Run
    rewalk: Rewalk | None = None

    def _run(self, order: FetchOrder, facts: RunFacts, target: BlockTarget) -> ChunkRun:
        run = super()._run(order, facts, target)
        if self.rewalk is not None:
            cast("_Run", run).walk_by(self.rewalk)
        return run


class SimFetcher(Fetcher):
    """A fetcher on simulated time; make it inside `run_simulated`.

    Args:
        trace: trace of the link.
        rtt_seconds: round trip of the link.
        table: table of the decoders; the truth here, and what the planner knows.
        config: section `fetch`.
        rewalk: another order of units; None = the fetcher's own.
    """

    work_type = _Work

    def __init__(
        self,
        trace: Trace,
        table: DecodeTable,
        config: FetchConfig,
        *,
        rtt_seconds: float,
        rewalk: Rewalk | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sim_link = SimLink(trace, rtt_seconds=rtt_seconds)
        self._decoders = _Decoders(table, self._work_of)
        self._num_decoders = table.num_decoders
        self._prompts: dict[int, SimPrompt] = {}
        self._prompt_of_name: dict[str, SimPrompt] = {}
        store = cast("Store", _Store(self._sim_link))
        super().__init__(
            store=store,
            leases=_Leases(),
            run_unit=self._decoders,
            config=config,
            table=table,
            num_decoders=table.num_decoders,
            clock=self._loop.time,
        )
        cast("_Work", self._work).rewalk = rewalk

    async def serve(self, prompts: Sequence[SimPrompt], *, at: float, policy: str) -> list[Outcome]:
        """Fetch for prompts that come together, `at` seconds after the trace's start."""
        # However long the ones before took, the link is the same for all policies.
        await asyncio.sleep(max(_GAP_SECONDS, at - self._loop.time() + self._sim_link.trace_starts))
        self._sim_link.trace_starts = self._loop.time() - at
        return await asyncio.gather(*(self._serve_one(prompt, policy) for prompt in prompts))

    async def _serve_one(self, prompt: SimPrompt, policy: str) -> Outcome:
        number = len(self._prompts) + 1
        self._prompts[number] = prompt
        ids = np.full(prompt.prefix_tokens + prompt.suffix_tokens, number, dtype=np.int32)
        started, link = self._loop.time(), self._sim_link
        asked = link.busy_seconds
        worked = self._decoders.busy_seconds()
        fetched = await self.fetch(ids, cache_salt="", policy=policy, is_cancelled=lambda: False)
        report = fetched.report
        transferred = max(0.0, link.idle_since - started)
        return Outcome(
            fetch_seconds=self._loop.time() - started,
            num_chunks=report.chunks_hit,
            num_bytes=report.bytes_fetched,
            network_bubble_seconds=transferred - (link.busy_seconds - asked),
            decoder_bubble_seconds=max(
                0.0, transferred - (self._decoders.at_arrival - worked) / self._num_decoders
            ),
            variants=report.variants,
            report=report,
        )

    async def _admit(self, input_ids: NDArray[np.int32], *others: Any) -> Any:
        request = await super()._admit(input_ids, *others)
        if request is None:
            return None
        prompt = self._prompts[int(input_ids[0])]
        self._prompt_of_name |= {key.name: prompt for key in request.keys}
        return replace(request, throughput=replace(request.throughput, prefill=prompt.prefill))

    async def _look_up(self, request: Any) -> Found:
        found = Found()
        for batch in probe_batches(len(request.keys)):
            names = [request.keys[index].name for index in batch]
            await self._reads.read_many(
                [ByteRange(name, 0, HEADER_READ_BYTES) for name in names], found.tally
            )
            header = self._prompt_of_name[names[0]].header
            found.chunks += [StoredChunk(name, header) for name in names]
        return found

    def _work_of(self, name: str, first_byte: int) -> UnitWork:
        return self._prompt_of_name[name].works[first_byte]


def make_header(spec: KVSpec, units: Sequence[tuple[str, int, int, int]]) -> ChunkHeader:
    """The header of a chunk nobody has.

    Args:
        spec: geometry.
        units: variant, first layer, layers, bytes; variant after variant.
    """
    entries: list[UnitEntry] = []
    offset = HEADER_READ_BYTES
    for variant, layer_start, num_layers, num_bytes in units:
        entries.append(UnitEntry(layer_start, num_layers, variant, offset, num_bytes, _DIGEST))
        offset += num_bytes
    return ChunkHeader(
        profile="balanced/1",
        spec=spec,
        identity=_DIGEST,
        chunk_key=_DIGEST,
        parent_key=_DIGEST,
        first_position=0,
        token_ids=(0,) * CHUNK_TOKENS,
        units=tuple(entries),
        header_bytes=HEADER_READ_BYTES,
        object_bytes=offset,
    )
