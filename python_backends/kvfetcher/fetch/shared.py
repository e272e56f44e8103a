"""Fetches that several requests wait for: one transfer, one decode, one restore, one lease.

A fetch runs as a task of its own. A request that leaves does not hurt the others; the last one's
leaving cancels it. Once its blocks are sealed, later requests for the same prefix share the lease
for as long as somebody holds it. One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvfetcher.errors import ArenaError, EngineError, KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvfetcher.fetch.report import Reason, RunFacts
    from kvfetcher.memory.leases import LeaseClaim

_MAX_KEPT = 256  # fetches that are over; each is a few hundred bytes

_log = logging.getLogger(__name__)

FetchKey = tuple[str, bool]
"""Object name of the prefix' last chunk; whether the gate was bypassed."""


class Holders(Protocol):
    """What holding a lease together takes of the engine."""

    async def share(self, lease_id: str) -> None: ...

    async def release(self, lease_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a fetch ended: the lease (None = nothing usable came) and what it did."""

    claim: LeaseClaim | None
    num_chunks: int
    facts: RunFacts


@dataclass(eq=False, slots=True)
class Waiter:
    """One request that waits for a fetch until `deadline`."""

    deadline: float
    holds_lease: bool = False


class SharedFetch:
    """One fetch. Made by `SharedFetches.start`."""

    def __init__(self) -> None:
        self.waiters: set[Waiter] = set()
        self.task: asyncio.Task[Outcome]
        self.is_running = False
        """Whether its units are under way: it will end by itself at its deadline."""
        self.is_sealing = False
        """Too late to cancel: holds on the lease are being given out."""
        self.expected_at = 0.0
        """When it should be over, as predicted when it began."""
        self.waits_for: tuple[Reason, str] = ("deadline", "too many other requests were fetching")
        """Why it is not done: the reason for a request that waits no longer."""
        self.facts_are_told = False
        """Whether some request's report has what the fetch did: it is counted once."""

    def deadline(self, num_ready: int) -> float:
        """When the fetch must end if it has `num_ready` chunks ready.

        One lease goes to all, once, and nothing can be taken out of it before. So what is ready is
        shared when the first waiter can wait no longer, even if others could: who came first would
        else leave with nothing for all its waiting, and where requests keep coming, each of them
        would. While nothing is ready, whoever can wait longer goes on alone.
        """
        deadlines = [waiter.deadline for waiter in self.waiters]
        choose = min if num_ready else max
        return choose(deadlines, default=float("-inf"))

    def join(self, deadline: float) -> Waiter:
        """One more request waits. It must `leave` again."""
        waiter = Waiter(deadline)
        self.waiters.add(waiter)
        return waiter


class SharedFetches:
    """The fetches of a process, by the prefix that they bring."""

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._fetches: OrderedDict[FetchKey, SharedFetch] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()

    def find(self, key: FetchKey) -> SharedFetch | None:
        """The fetch of a prefix that runs, or whose lease may still stand."""
        return self._fetches.get(key)

    def start(
        self,
        key: FetchKey,
        work: Callable[[SharedFetch], Awaitable[Outcome]],
        *,
        deadline: float,
        expected_at: float,
    ) -> tuple[SharedFetch, Waiter]:
        """Begin a fetch with its first waiter."""
        fetch = SharedFetch()
        fetch.expected_at = expected_at
        waiter = fetch.join(deadline)
        fetch.task = asyncio.ensure_future(work(fetch))
        self._fetches[key] = fetch

        def end(task: asyncio.Task[Outcome]) -> None:
            if task.cancelled() or task.exception() is not None or task.result().claim is None:
                self._drop(key, fetch)

        fetch.task.add_done_callback(end)
        while len(self._fetches) > _MAX_KEPT and next(iter(self._fetches.values())).task.done():
            self._fetches.popitem(last=False)
        return fetch, waiter

    async def take(self, key: FetchKey, fetch: SharedFetch, waiter: Waiter) -> Outcome | None:
        """The outcome of a fetch that is over, with a lease that is this waiter's own.

        Returns:
            None if the lease is gone already (only for requests that came late).
        """
        outcome = fetch.task.result()
        if outcome.claim is None or waiter.holds_lease:
            waiter.holds_lease = False  # the claim is handed on: leaving does not release it
            return outcome
        try:
            await self._holders.share(outcome.claim.lease_id)
        except (ArenaError, EngineError):
            self._drop(key, fetch)
            return None
        return outcome

    def leave(self, key: FetchKey, fetch: SharedFetch, waiter: Waiter) -> None:
        """This request waits no more; what it holds is released, the last one cancels the fetch."""
        fetch.waiters.discard(waiter)
        if waiter.holds_lease:
            waiter.holds_lease = False
            claim = fetch.task.result().claim if fetch.task.done() else None
            if claim is not None:
                self.release_later(claim.lease_id)
        if not (fetch.waiters or fetch.is_sealing or fetch.task.done()):
            self._drop(key, fetch)
            fetch.task.cancel()

    def release_later(self, lease_id: str, *, after: Awaitable[None] | None = None) -> None:
        """Give a hold on a lease back, once nothing writes to its blocks any more."""

        async def release() -> None:
            if after is not None:
                await after
            try:
                await self._holders.release(lease_id)
            except KVFetcherError as exc:
                _log.warning("lease %s not released: %s", lease_id, exc)

        self.run_later(release())

    def run_later(self, work: Awaitable[None]) -> None:
        """Keep something running that no request waits for."""

        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _drop(self, key: FetchKey, fetch: SharedFetch) -> None:
        if self._fetches.get(key) is fetch:
            del self._fetches[key]
