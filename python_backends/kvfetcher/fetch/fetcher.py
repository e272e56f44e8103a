"""Get a stored prefix into leased arena blocks, or say why not.

Per request: look the prompt's chunks up, ask the gate how many are worth fetching (`gate.py`), join
the fetch of that prefix or start it, and wait for it until the deadline. A fetch (`shared.py`) waits
for its slot in the queue, leases blocks, runs its units, and seals what is whole (`work.py`). The fetcher is handed the store, the engine's lease service and a callable
that decodes and restores one unit, so it knows no backend, no codec and no Triton.

Promise: `fetch` returns a sealed lease only after every byte was fetched, checked, decoded,
restored and checked again. Whatever fails before that makes the hit shorter, with a reason.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvfetcher.errors import (
    EngineError,
    RequestCancelledError,
    RequestError,
)
from kvfetcher.fetch.engine_side import EngineThroughput, FetchFacts, LeaseService
from kvfetcher.fetch.learning import UnitStatus
from kvfetcher.fetch.lookup import Found, look_up
from kvfetcher.fetch.planning.bandwidth import LinkEstimator
from kvfetcher.fetch.planning.gate import Decision, Prompt, decide, join, regret
from kvfetcher.fetch.planning.pipeline import ChunkCost, finish_times
from kvfetcher.fetch.planning.plan import usable_chunks
from kvfetcher.fetch.probe import LinkProbe
from kvfetcher.fetch.queues import FetchQueue
from kvfetcher.fetch.reads import SharedReads, Tally
from kvfetcher.fetch.report import FetchReport, GateReport
from kvfetcher.fetch.shared import FetchKey, Outcome, SharedFetch, SharedFetches, Waiter
from kvfetcher.fetch.stages import RunUnit, Stages
from kvfetcher.fetch.warm import Warmer
from kvfetcher.fetch.work import FetchOrder, FetchWork
from kvfetcher.format.keys import ChunkKey, chunk_keys
from kvfetcher.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.config import FetchConfig
    from kvfetcher.fetch.planning.bandwidth import LinkEstimate
    from kvfetcher.fetch.planning.decode_times import DecodeTable
    from kvfetcher.fetch.planning.pipeline import Machine
    from kvfetcher.fetch.run import StoredChunk
    from kvfetcher.memory.leases import LeaseClaim
    from kvfetcher.storage.base import LocalCopies, Store

__all__ = [
    "EngineThroughput",
    "FetchFacts",
    "Fetched",
    "Fetcher",
    "LeaseService",
    "RunUnit",
    "UnitStatus",
]

_log = logging.getLogger(__name__)

# How often a waiting request looks whether its client is still there.
_POLL_SECONDS = 0.1
# Share of its time by which a fetch may miss its deadline: decoders end, and blocks are sealed.
_GRACE = 0.15
_MIN_GRACE_SECONDS = 0.5
# Share of the computing time that a look-up may take, where the gate decides.
_LOOKUP_SHARE = 0.25
_MIN_LOOKUP_SECONDS = 0.2
# With fewer transfers, or older ones, the link's estimate is a guess: a first chunk may be fetched to
# learn.
_FEW_TRANSFERS = 4
_OLD_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """A lease on ready KV (None = compute everything) and what happened."""

    claim: LeaseClaim | None
    report: FetchReport

    @property
    def lease_json(self) -> str:
        return self.claim.to_json() if self.claim else ""


@dataclass(frozen=True, slots=True)
class FetchLoad:
    """What a fetcher does now, for metrics."""

    num_waiting: int
    inflight_bytes: int
    bytes_per_second: float
    """Estimated rate of the link."""


@dataclass(frozen=True, slots=True)
class _Request:
    """One request after its first checks."""

    input_ids: NDArray[np.int32]
    tenant: str
    is_gated: bool
    facts: FetchFacts
    throughput: EngineThroughput
    keys: list[ChunkKey]
    """Keys of the whole chunks that may come from the store."""
    started: float
    deadline: float
    """Deadline by the configuration; the gate may set an earlier one."""
    is_cancelled: Callable[[], bool]
    report: FetchReport

    @property
    def prompt(self) -> Prompt:
        return Prompt(len(self.input_ids), self.facts.chunk_tokens, self.throughput.prefill)

    def key_of(self, num_chunks: int) -> FetchKey:
        return self.keys[num_chunks - 1].name, not self.is_gated


class Fetcher:
    """Fetches prefixes for many requests at a time.

    Not thread-safe: one event loop. Requests that hit nothing never wait for those that do: only
    fetches wait for one of `max_inflight_requests` slots.

    Args:
        store: what `open_store` returns.
        local: says which reads of `store` need no network; None = none.
        one_read_fills_link: False for stores that limit each connection.
        leases: the engine's.
        run_unit: decodes and restores one unit.
        config: section `fetch`.
        table: decode times.
        num_decoders: units that are decoded side by side.
        clock: seconds, monotonic.
    """

    work_type: ClassVar[type[FetchWork]] = FetchWork

    def __init__(
        self,
        *,
        store: Store,
        leases: LeaseService,
        run_unit: RunUnit,
        config: FetchConfig,
        table: DecodeTable,
        num_decoders: int,
        local: LocalCopies | None = None,
        one_read_fills_link: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._config = config
        self._clock = clock
        link = LinkEstimator(
            prior_bytes_per_second=config.expected_gbit_per_second * 1e9 / 8,
            prior_rtt_seconds=config.expected_rtt_seconds,
            half_life_seconds=config.link_half_life_seconds,
        )
        self._keeps_copies = local is not None
        self._reads = SharedReads(store, link=link, local=local, clock=clock)
        self._probe = LinkProbe(self._reads)
        self._stages = Stages(
            reads=self._reads,
            link=link,
            table=table,
            num_decoders=num_decoders,
            run_unit=run_unit,
            max_inflight_reads=config.max_inflight_reads,
            one_read_fills_link=one_read_fills_link,
            max_inflight_bytes=config.max_inflight_bytes,
            max_inflight_units=config.units_in_flight(num_decoders),
            max_read_bytes=config.max_read_bytes,
            clock=clock,
        )
        self._queue = FetchQueue(
            num_slots=config.max_inflight_requests,
            max_waiting=config.max_waiting_requests,
            ageing=config.ageing,
            clock=clock,
        )
        self._warmer = Warmer(self._stages)
        self._fetches = SharedFetches(leases)
        self._work = self.work_type(
            stages=self._stages,
            queue=self._queue,
            leases=leases,
            fetches=self._fetches,
            store=store,
            config=config,
            clock=clock,
        )

    async def fetch(
        self,
        input_ids: NDArray[np.int32],
        *,
        cache_salt: str,
        policy: str,
        is_cancelled: Callable[[], bool],
        request_id: str = "",
    ) -> Fetched:
        """Fetch the longest stored prefix of `input_ids` that is worth it.

        Args:
            input_ids: [num_tokens] int32.
            cache_salt: separates tenants; part of every key.
            policy: one of wire.KV_POLICIES; `fetch` bypasses the gate, `warm` only brings the
                chunks into the store's copies near by.
            is_cancelled: polled while the request waits.
            request_id: the client's name for the request, for the log.

        Returns:
            A sealed lease that the engine can claim, or none, and the report.

        Raises:
            RequestCancelledError: the client went away; the lease is released.
            RequestError: the prompt is longer than the engine takes.
        """
        started = self._clock()
        report = FetchReport(policy=policy, prompt_tokens=len(input_ids))
        claim = None
        request = await self._admit(input_ids, cache_salt, policy, is_cancelled, report, started)
        if request is not None and policy == "warm":
            await self._warm(request)
        elif request is not None:
            claim = await self._serve(request)
        report.add_ms("total", (self._clock() - started) * 1e3)
        _log.info(
            "request %s: fetch %s: %d of %d tokens, %d bytes, %.0f ms %s %s",
            request_id or "without id", report.outcome, report.hit_tokens, report.prompt_tokens, report.bytes_fetched,
            report.stages_ms["total"], report.reason, report.detail,
        )  # fmt: skip
        return Fetched(claim, report)

    def load(self) -> FetchLoad:
        """What is going on now."""
        return FetchLoad(
            num_waiting=self._queue.num_waiting,
            inflight_bytes=self._stages.budget.used_bytes,
            bytes_per_second=self._stages.link().bytes_per_second,
        )

    # One request

    async def _admit(
        self,
        input_ids: NDArray[np.int32],
        cache_salt: str,
        policy: str,
        is_cancelled: Callable[[], bool],
        report: FetchReport,
        started: float,
    ) -> _Request | None:
        """What needs no store: policy, the engine's facts, the keys. None = nothing to fetch."""
        if policy in ("recompute", "no_store") or not self._config.enabled:
            report.outcome = "skipped"
            report.give_up("policy" if policy in ("recompute", "no_store") else "disabled")
            return None
        if policy == "warm" and not self._keeps_copies:
            report.outcome = "skipped"
            report.give_up(
                "no_copies", "set store.tier_memory_bytes or store.tier_disk_bytes to keep some"
            )
            return None
        deadline = started + self._config.deadline_seconds
        try:
            async with asyncio.timeout(self._config.deadline_seconds):
                facts, throughput = await asyncio.gather(
                    self._leases.facts(), self._leases.throughput()
                )
        except (EngineError, TimeoutError) as exc:
            report.give_up("engine_error", str(exc) or "the engine did not answer in time")
            return None
        if len(input_ids) > facts.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {len(input_ids)} tokens, this engine takes at most"
                f" {facts.max_prompt_tokens}; shorten it"
            )
        usable = usable_chunks(len(input_ids), facts.chunk_tokens)
        if not usable:
            report.give_up("short_prompt")
            return None
        keys = chunk_keys(
            input_ids[: usable * facts.chunk_tokens].tolist(),
            facts.chunk_tokens, facts.identity_digest, cache_salt,
        )  # fmt: skip
        return _Request(
            input_ids=input_ids,
            tenant=cache_salt,
            is_gated=policy == "auto",
            facts=facts,
            throughput=throughput,
            keys=keys,
            started=started,
            deadline=deadline,
            is_cancelled=is_cancelled,
            report=report,
        )

    async def _serve(self, request: _Request) -> LeaseClaim | None:
        usable, report = len(request.keys), request.report
        key = request.key_of(usable)
        begun = self._clock()
        if (running := self._fetches.find(key)) is not None:
            # Somebody fetches all that this prompt could use: no look-up is needed.
            left = 0.0 if running.task.done() else max(0.0, running.expected_at - begun)
            decision = join(usable, request.prompt, left_seconds=left)
            report.gate = GateReport.of(decision, self._stages.link(), num_chunks=usable)
            is_over, claim = await self._join(
                request, key, None, worth_seconds=decision.deadline_seconds
            )
            if is_over:
                self._tell_regret(request, decision, begun=begun)
                return claim
            report.gate = None
        with _timed(report, "lookup", self._clock):
            found = await self._look_up(request)
        report.chunks_stored = len(found.chunks)
        order, decision = self._decide(request, found.chunks)
        if order is None:
            return None
        wanted = len(order.chunks)
        begun = self._clock()
        _, claim = await self._join(
            request, request.key_of(wanted), order, worth_seconds=decision.deadline_seconds
        )
        if report.reason in ("fell_behind", "deadline"):
            # Transfers that were given up tell no rate: the next request would fare the same.
            self._probe.consider(order.chunks[0], self._stages.link())
        self._tell_regret(request, decision, begun=begun)
        return claim

    def _tell_regret(self, request: _Request, decision: Decision, *, begun: float) -> None:
        """Report how a fetch turned out that began so and is over now."""
        report, spent = request.report, self._clock() - begun
        if report.gate is not None:
            result = regret(
                decision,
                request.prompt,
                lookup_seconds=report.stages_ms.get("lookup", 0.0) / 1e3,
                fetch_seconds=spent,
                num_chunks=report.chunks_hit,
            )
            report.gate.tell(result, fetch_seconds=spent)

    async def _warm(self, request: _Request) -> None:
        """Read every stored chunk of the prompt whole: the store keeps what is read in its tier."""
        report = request.report
        with _timed(report, "lookup", self._clock):
            found = await self._look_up(request)
        report.chunks_stored = len(found.chunks)
        report.outcome = "warmed"
        tally = Tally()
        try:
            with _timed(report, "fetch", self._clock):
                async with asyncio.timeout(request.deadline - self._clock()):
                    warming = self._warm_all(found.chunks, report, tally)
                    await _unless_cancelled(warming, request.is_cancelled)
        except TimeoutError:
            left = report.chunks_stored - report.chunks_hit
            report.replace_reason("deadline", f"{left} chunks were not read")
        finally:
            report.bytes_fetched += tally.num_bytes
            report.reads += tally.num_reads

    async def _warm_all(
        self, chunks: Sequence[StoredChunk], report: FetchReport, tally: Tally
    ) -> None:
        for chunk in chunks:
            try:
                await self._warmer.read(chunk, tally)
                report.chunks_hit += 1
            except Exception as exc:  # noqa: BLE001 - told, and the others are worth reading
                report.replace_reason(*self._work.failures.note(chunk.name, exc))

    async def _look_up(self, request: _Request) -> Found:
        now = self._clock()
        limit = request.deadline - now
        if request.is_gated:
            compute = request.prompt.compute_seconds(0)
            limit = min(limit, max(_MIN_LOOKUP_SECONDS, _LOOKUP_SHARE * compute))
        found = Found()
        report = request.report
        try:
            async with asyncio.timeout(limit):
                looking = look_up(
                    self._reads,
                    request.keys,
                    request.input_ids,
                    identity_digest=request.facts.identity_digest,
                    chunk_tokens=request.facts.chunk_tokens,
                    found=found,
                )
                await _unless_cancelled(looking, request.is_cancelled)
        except TimeoutError:
            report.give_up("store_timeout", f"the look-up took longer than {limit:.2f} s")
        report.bytes_fetched += found.tally.num_bytes
        report.reads += found.tally.num_reads
        if found.failure is not None:
            report.give_up(*self._work.failures.note(found.ended_at, found.failure))
        elif found.mismatch:
            # Left there, it would be a miss for ever: a name that is taken is not saved again.
            self._work.failures.set_aside(found.ended_at, found.mismatch)
            report.give_up("identity_mismatch", f"{found.ended_at}: {found.mismatch}")
        elif found.ended_at:
            report.give_up("not_stored")
        self._pass_over(found, report)
        local = await self._reads.are_local(
            [ByteRange(chunk.name, 0, chunk.header.object_bytes) for chunk in found.chunks]
        )
        found.chunks = [
            replace(chunk, is_local=True) if is_local else chunk
            for chunk, is_local in zip(found.chunks, local, strict=True)
        ]
        return found

    def _pass_over(self, found: Found, report: FetchReport) -> None:
        """Leave out what is stored from a chunk on that did not decode here lately."""
        is_bad = self._work.failures.undecodable.is_passed_over
        first = next((i for i, chunk in enumerate(found.chunks) if is_bad(chunk.name)), None)
        if first is not None:
            name = found.chunks[first].name
            report.replace_reason(
                "decode_error", f"{name}: it did not decode here lately and is passed over"
            )
            del found.chunks[first:]

    def _decide(
        self, request: _Request, chunks: list[StoredChunk]
    ) -> tuple[FetchOrder | None, Decision]:
        """Ask the gate; the order is None where nothing is to be fetched."""
        facts, report = request.facts, request.report
        room = request.throughput.arena_tokens // facts.chunk_tokens
        if len(chunks) > room:
            report.give_up("arena_full", f"the whole arena holds {room} chunks")
            chunks = chunks[:room]
        link = self._stages.link()
        machine = self._stages.machine(with_planned=True)
        costs = self._costs(chunks, link, machine)
        finish = finish_times(costs, link=link, machine=machine)
        hopeful: list[float] = []
        if link.num_transfers < _FEW_TRANSFERS or link.age_seconds > _OLD_SECONDS:
            best = link.high_bytes_per_second
            fast = replace(link, bytes_per_second=best, recent_bytes_per_second=best)
            hopeful = finish_times(costs, link=fast, machine=machine)
        decision = decide(
            finish,
            request.prompt,
            margin=self._config.gate_margin,
            optimistic_seconds=hopeful,
            bypass=not request.is_gated,
        )
        if len(chunks) * facts.chunk_tokens < self._config.min_hit_tokens:
            if chunks and report.reason in ("", "not_stored"):
                report.replace_reason("too_short")
            return None, decision
        report.gate = GateReport.of(decision, link, num_chunks=len(chunks))
        wanted = decision.num_chunks
        if wanted < len(chunks):
            report.replace_reason(
                "slower_than_computing",
                f"{wanted} of {len(chunks)} chunks were worth fetching, by prediction",
            )
        if not wanted:
            if chunks:
                self._probe.consider(chunks[0], link)
            return None, decision
        order = FetchOrder(
            tenant=request.tenant,
            input_ids=request.input_ids,
            facts=facts,
            prompt=request.prompt if request.is_gated else None,
            chunks=chunks[:wanted],
            costs=costs[:wanted],
            fetch_seconds=finish[wanted - 1],
        )
        return order, decision

    def _costs(
        self, chunks: Sequence[StoredChunk], link: LinkEstimate, machine: Machine
    ) -> list[ChunkCost]:
        """Costs of the chunks in the variants that would be fetched now."""
        if not chunks:
            return []
        walk = self._stages.walk(
            (chunk.header for chunk in chunks),
            self._stages.learning.factors,
            hysteresis=self._config.variant_hysteresis,
        )
        walk.start(link=link, machine=machine)
        return [chunk.priced(cost) for chunk, cost in zip(chunks, walk.costs(), strict=True)]

    async def _join(
        self, request: _Request, key: FetchKey, order: FetchOrder | None, *, worth_seconds: float
    ) -> tuple[bool, LeaseClaim | None]:
        """Wait for the fetch of a prefix, started here where there is none and there is an order.

        Args:
            request: whose.
            key: key of the prefix.
            order: how to fetch it; None = only join.
            worth_seconds: time after which computing the prefix would have been as fast.

        Returns:
            Whether that settled it, and the lease.

        Raises:
            RequestCancelledError: the client went away.
        """
        now = self._clock()
        deadline = request.deadline
        if request.is_gated:
            deadline = min(deadline, now + worth_seconds)
        while True:
            fetch = self._fetches.find(key)
            if fetch is not None:
                waiter = fetch.join(deadline)
                request.report.shared = True
            elif order is not None and self._queue.is_full:
                request.report.replace_reason(
                    "line_full", f"{self._queue.num_waiting} prefixes wait to be fetched"
                )
                return True, None
            elif order is not None:
                work = functools.partial(self._work.carry_out, order=order)
                fetch, waiter = self._fetches.start(
                    key, work, deadline=deadline, expected_at=now + order.fetch_seconds
                )
                request.report.shared = False
            else:
                return False, None
            try:
                with _timed(request.report, "fetch", self._clock):
                    if not await self._wait(request, fetch, waiter, late_after=now):
                        return True, None
                outcome = await self._fetches.take(key, fetch, waiter)
                if outcome is not None:
                    return True, self._tell(request, fetch, outcome)
            finally:
                self._fetches.leave(key, fetch, waiter)

    async def _wait(
        self, request: _Request, fetch: SharedFetch, waiter: Waiter, *, late_after: float
    ) -> bool:
        """Wait until the fetch is over; False = it failed, or took longer than it may."""
        report = request.report
        grace = max(_MIN_GRACE_SECONDS, _GRACE * (waiter.deadline - late_after))
        while not fetch.task.done():
            left = waiter.deadline - self._clock()
            if left <= (-grace if fetch.is_running else 0.0):
                report.replace_reason(*fetch.waits_for)
                return False
            if request.is_cancelled():
                raise RequestCancelledError("the request was cancelled while its KV was fetched")
            await asyncio.wait({fetch.task}, timeout=min(_POLL_SECONDS, max(left, 0.005)))
        if fetch.task.cancelled() or (exc := fetch.task.exception()) is None:
            return not fetch.task.cancelled()
        _log.error("unexpected %s in a fetch", type(exc).__name__, exc_info=exc)
        report.give_up("decode_error", type(exc).__name__)
        return False

    def _tell(self, request: _Request, fetch: SharedFetch, outcome: Outcome) -> LeaseClaim | None:
        """Put what a fetch did into the report of a request that waited for it."""
        report, facts = request.report, outcome.facts
        if facts.reason:
            report.replace_reason(facts.reason, facts.detail)
        if not fetch.facts_are_told:
            fetch.facts_are_told = True
            report.add_run(facts)
        if outcome.claim is None:
            return None
        report.chunks_hit = outcome.num_chunks
        report.hit_tokens = outcome.claim.num_tokens
        report.bytes_bf16 = report.hit_tokens * request.facts.spec.elements_per_token * 2
        report.profile = facts.profile
        report.outcome = "hit" if report.chunks_hit == len(request.keys) else "partial"
        return outcome.claim


async def _unless_cancelled(
    work: Coroutine[None, None, None], is_cancelled: Callable[[], bool]
) -> None:
    """Await `work`, looking now and then whether anybody still wants it.

    Raises:
        RequestCancelledError: nobody does; `work` is cancelled.
    """
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_SECONDS))[0]:
            if is_cancelled():
                raise RequestCancelledError("the request was cancelled before its KV was fetched")
        task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


@contextmanager
def _timed(report: FetchReport, stage: str, clock: Callable[[], float]) -> Iterator[None]:
    started = clock()
    try:
        yield
    finally:
        report.add_ms(stage, (clock() - started) * 1e3)
