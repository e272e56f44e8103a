"""One fetch, from its wait in the queue to its sealed lease, for all that wait for it.

It waits for a slot (`queues.FetchQueue`), leases blocks, runs the units (`run.py`), and seals what is whole.
One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvfetcher.errors import ArenaError, ArenaFullError, EngineError
from kvfetcher.fetch.failures import Failures
from kvfetcher.fetch.report import RunFacts
from kvfetcher.fetch.run import ChunkRun, StoredChunk
from kvfetcher.fetch.shared import Outcome, SharedFetch, SharedFetches
from kvfetcher.fetch.stages import Backlog
from kvfetcher.memory.leases import LeaseClaim, tokens_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.config import FetchConfig
    from kvfetcher.fetch.engine_side import FetchFacts, LeaseService
    from kvfetcher.fetch.planning.gate import Prompt
    from kvfetcher.fetch.planning.pipeline import ChunkCost
    from kvfetcher.fetch.queues import FetchQueue
    from kvfetcher.fetch.stages import Stages
    from kvfetcher.memory.arena import BlockTarget
    from kvfetcher.storage.base import Store

_ARENA_RETRY_SECONDS = 0.02
# A run ends after this part of its lease's time, so that it can be sealed in time. Nobody renews the
# lease: what still writes then has the blocks' rest, as long again, to end.
_LEASE_SHARE = 0.8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """A prefix that is to be fetched."""

    tenant: str
    input_ids: NDArray[np.int32]
    """Token ids of the prompt; the prefix is their beginning."""
    facts: FetchFacts
    prompt: Prompt | None
    """What would be computed instead; None = fetch whatever it takes."""
    chunks: list[StoredChunk]
    costs: list[ChunkCost]
    fetch_seconds: float
    """Predicted."""


class _Leased(NamedTuple):
    """Blocks for a fetch."""

    lease_id: str
    target: BlockTarget
    until: float
    """When the run must end, whoever waits for it; on the fetcher's clock."""


class FetchWork:
    """Carries fetches out; what they share is handed in.

    Args:
        stages: transfer, decode and restore.
        queue: where it waits for its slot.
        leases: the engine's.
        fetches: keeps what runs on when nobody waits any more.
        store: where corrupt objects are set aside.
        config: section `fetch`.
        clock: seconds, monotonic.

    Attributes:
        failures: where the store's are told.
    """

    run_type: ClassVar[type[ChunkRun]] = ChunkRun

    def __init__(
        self,
        *,
        stages: Stages,
        queue: FetchQueue,
        leases: LeaseService,
        fetches: SharedFetches,
        store: Store,
        config: FetchConfig,
        clock: Callable[[], float],
    ) -> None:
        self._stages = stages
        self._queue = queue
        self._leases = leases
        self._fetches = fetches
        self.failures = Failures(store, clock=clock)
        self._on_failure = self.failures.note
        self._config = config
        self._clock = clock

    async def carry_out(self, fetch: SharedFetch, order: FetchOrder) -> Outcome:
        """Bring the chunks; cancelled, everything is given back once nothing writes any more."""
        facts = RunFacts(profile=order.chunks[0].header.profile)
        planned = self._stages.planned
        ordered = Backlog(
            sum(cost.num_bytes for cost in order.costs),
            sum(cost.decode_seconds for cost in order.costs),
        )
        planned.add(ordered)
        is_planned = True
        queued = self._clock()
        try:
            async with self._queue.slot(order.tenant, fetch_seconds=order.fetch_seconds):
                facts.add_ms("wait", self._clock() - queued)
                leased = await self._lease(fetch, order, facts)
                # From here on the run keeps account of what it plans.
                planned.remove(ordered)
                is_planned = False
                if leased is None:
                    return Outcome(None, 0, facts)
                return await self._restore(fetch, order, facts, leased)
        finally:
            if is_planned:
                planned.remove(ordered)

    async def _lease(
        self, fetch: SharedFetch, order: FetchOrder, facts: RunFacts
    ) -> _Leased | None:
        """Lease blocks, waiting for room as long as somebody waits for the fetch."""
        started = self._clock()
        num_tokens = len(order.chunks) * order.facts.chunk_tokens
        try:
            while True:
                until = self._clock() + _LEASE_SHARE * self._config.lease_ttl_seconds
                try:
                    lease_id, target = await self._lease_or_release(num_tokens)
                    return _Leased(lease_id, replace(target, tenant=order.tenant), until)
                except ArenaFullError as exc:
                    fetch.waits_for = ("arena_full", str(exc))
                    if self._clock() + _ARENA_RETRY_SECONDS >= fetch.deadline(0):
                        facts.end("arena_full", str(exc))
                        return None
                await asyncio.sleep(_ARENA_RETRY_SECONDS)
        except (ArenaError, EngineError) as exc:
            facts.end("engine_error", str(exc))
            return None
        finally:
            facts.add_ms("arena_wait", self._clock() - started)

    async def _lease_or_release(self, num_tokens: int) -> tuple[str, BlockTarget]:
        """Lease; cancelled, a lease that is granted all the same is released."""
        asked = asyncio.ensure_future(
            self._leases.lease(num_tokens, self._config.lease_ttl_seconds)
        )
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:

            async def give_back() -> None:
                with suppress(ArenaError, EngineError):
                    lease_id, _ = await asked
                    self._fetches.release_later(lease_id)

            self._fetches.run_later(give_back())
            raise

    async def _restore(
        self, fetch: SharedFetch, order: FetchOrder, facts: RunFacts, leased: _Leased
    ) -> Outcome:
        run = self._run(order, facts, leased.target)
        fetch.is_running = True
        fetch.waits_for = ("deadline", "its units were not finished in time")
        try:
            num_chunks = await run.finish(
                lambda num_ready: min(fetch.deadline(num_ready), leased.until)
            )
            for chunk in order.chunks[:num_chunks]:
                self.failures.undecodable.forget(chunk.name)
            if not num_chunks:
                await self._release(leased.lease_id, run)
                return Outcome(None, 0, facts)
            claim = await self._seal(fetch, order, facts, leased, num_chunks, is_live=run.is_live)
        except BaseException:
            self._fetches.release_later(leased.lease_id, after=run.drained())
            raise
        if claim is None:  # not sealed: the lease is open still, or was over
            self._fetches.release_later(leased.lease_id, after=run.drained())
            return Outcome(None, 0, facts)
        self._fetches.run_later(run.drained())
        return Outcome(claim, num_chunks, facts)

    def _run(self, order: FetchOrder, facts: RunFacts, target: BlockTarget) -> ChunkRun:
        return self.run_type(
            self._stages,
            order.chunks,
            target,
            tokens_per_block=order.facts.tokens_per_block,
            facts=facts,
            on_failure=self._on_failure,
            hysteresis=self._config.variant_hysteresis,
            prompt=order.prompt,
            margin=self._config.gate_margin,
        )

    async def _release(self, lease_id: str, run: ChunkRun) -> None:
        """Give the blocks of a fetch that brought nothing back."""
        if run.is_live:
            self._fetches.release_later(lease_id, after=run.drained())
            return
        try:
            await self._leases.release(lease_id)
        except (ArenaError, EngineError) as exc:
            _log.warning("lease %s not released: %s", lease_id, exc)

    async def _seal(
        self,
        fetch: SharedFetch,
        order: FetchOrder,
        facts: RunFacts,
        leased: _Leased,
        num_chunks: int,
        *,
        is_live: bool,
    ) -> LeaseClaim | None:
        """Seal what is whole for all that wait now; requests that come during this share later.

        None where the engine refused or did not answer.
        """
        lease_id, target, _ = leased
        num_tokens = num_chunks * order.facts.chunk_tokens
        holders = list(fetch.waiters)
        fetch.is_sealing = True
        try:
            await self._leases.seal(
                lease_id,
                num_tokens,
                tokens_digest(order.input_ids[:num_tokens]),
                num_holders=max(1, len(holders)),
                tail_is_live=is_live,
            )
        except (ArenaError, EngineError) as exc:
            facts.end("engine_error", str(exc))
            return None
        for waiter in holders:
            if waiter in fetch.waiters:
                waiter.holds_lease = True
            else:
                self._fetches.release_later(lease_id)
        if not holders:
            self._fetches.release_later(lease_id)
        return LeaseClaim(lease_id, num_tokens, target.generation)
