"""A store behind a breaker, with retries and hedged reads.

Wraps one remote store, below any local tier, so that a dead remote does not hide what lies near.
An open breaker answers `StoreUnavailableError` at once, without I/O. Only `TransientStoreError` is
retried. Deadlines are the caller's: cancelling a call cancels its retries and its second read.

Only a look-up (a small `get_ranges`) whose asker leaves runs on until the store's own timeout, its
answer unused. Look-ups are given up after a fraction of that, so of a store that swallows every
call the breaker would never hear, and a connection that takes long to make would never be made.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from kvfetcher.errors import (
    ChunkNotFoundError,
    StoreError,
    StoreFullError,
    StoreThrottledError,
    StoreTimeoutError,
    StoreUnavailableError,
    TransientStoreError,
)
from kvfetcher.storage.base import check_name, check_prefix, check_range, check_ranges
from kvfetcher.storage.breaker import Breaker
from kvfetcher.storage.hedging import HedgePolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from kvfetcher.storage.base import ByteRange, ObjectInfo, SetAside, Store

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

GuardEvent = Literal[
    "retry", "hedge", "hedge_won", "failure", "throttled", "opened", "closed", "refused"
]
"""What a guard tells its observer, for metrics."""

_FIRST_RETRY_SECONDS = 0.05
_MAX_RETRY_SECONDS = 1.0
_THROTTLED_FACTOR = 4
_MAX_SLOW_NAMES = 64
# As much as the headers of a look-up take; more is a transfer, and stops when nobody wants it.
_MAX_LEFTOVER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """Knobs of `GuardedStore`; defaults are in `config.StoreConfig`."""

    max_retries: int
    hedge_fraction: float
    min_failures: int
    min_backoff_seconds: float
    max_backoff_seconds: float
    window: int = 20
    """Calls that the breaker remembers."""


class GuardedStore:
    """See the module's text; verbs as in `storage.base`. One event loop.

    Args:
        inner: the remote store.
        options: see `GuardOptions`.
        observe: called with each event.
        clock: seconds, monotonic.
        uniform: random numbers in [0, 1) for jitter.
    """

    def __init__(
        self,
        inner: Store,
        options: GuardOptions,
        *,
        observe: Callable[[GuardEvent], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._inner = inner
        self._options = options
        self._observe = observe
        self._clock = clock
        self._uniform = uniform
        self._slow_names = _SlowNames()
        self._hedges = HedgePolicy(fraction=options.hedge_fraction)
        self._leftovers: set[asyncio.Task[list[bytes | StoreError]]] = set()
        # So many failures at once open the breaker whatever it remembers; more would teach nothing.
        self._max_leftovers = max(options.min_failures, (options.window + 1) // 2)
        self.breaker = Breaker(
            window=options.window,
            min_failures=options.min_failures,
            min_backoff_seconds=options.min_backoff_seconds,
            max_backoff_seconds=options.max_backoff_seconds,
            random=uniform,
        )

    @property
    def lookup_batch_size(self) -> int:
        """See `GetRanges.lookup_batch_size`."""
        return self._inner.lookup_batch_size

    async def get(self, name: str) -> bytes:
        return await self._retried(name, lambda: self._watched(self._inner.get, name))

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        check_range(name, start, end)
        return await self._retried(
            name,
            lambda: self._hedged(
                lambda: self._inner.get_range(name, start, end), end - start, name
            ),
        )

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        check_ranges(ranges)
        answers: dict[ByteRange, bytes | StoreError] = {}
        left = list(ranges)
        for attempt in range(self._options.max_retries + 1):
            if attempt:
                self._observe("retry")
                throttled = any(isinstance(answers[p], StoreThrottledError) for p in left)
                await self._pause(attempt - 1, throttled=throttled)
            answers.update(zip(left, await self._batch(left), strict=True))
            left = [part for part in left if isinstance(answers[part], TransientStoreError)]
            if not left:
                break
        return [answers[part] for part in ranges]

    async def head(self, name: str) -> ObjectInfo | None:
        return await self._retried(name, lambda: self._watched(self._inner.head, name))

    async def put(self, name: str, data: bytes) -> bool:
        return await self._retried(name, lambda: self._watched(self._inner.put, name, data))

    async def delete(self, name: str) -> None:
        await self._retried(name, lambda: self._watched(self._inner.delete, name))

    async def quarantine(self, name: str, reason: str) -> None:
        await self._retried(name, lambda: self._watched(self._inner.quarantine, name, reason))

    async def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        with self._verdict(0):
            async for info in self._inner.list_prefix(prefix):
                yield info

    async def list_quarantined(self) -> AsyncIterator[SetAside]:
        with self._verdict(0):
            async for aside in self._inner.list_quarantined():
                yield aside

    async def delete_quarantined(self, aside: SetAside) -> None:
        name = aside.info.name
        await self._retried(name, lambda: self._watched(self._inner.delete_quarantined, aside))

    async def close(self) -> None:
        for task in self._leftovers:
            task.cancel()
        await asyncio.gather(*self._leftovers, return_exceptions=True)
        await self._inner.close()

    async def _retried(self, name: str, call: Callable[[], Awaitable[Result]]) -> Result:
        check_name(name)  # not the store's fault: the breaker must not hear of it
        for attempt in range(self._options.max_retries):
            try:
                return await call()
            except TransientStoreError as exc:
                self._observe("retry")
                throttled = isinstance(exc, StoreThrottledError)
            await self._pause(attempt, throttled=throttled)
        return await call()

    async def _pause(self, attempt: int, *, throttled: bool) -> None:
        first = _FIRST_RETRY_SECONDS * (_THROTTLED_FACTOR if throttled else 1)
        seconds = min(first * 2**attempt, _MAX_RETRY_SECONDS)
        await asyncio.sleep(seconds * (0.5 + 0.5 * self._uniform()))

    async def _batch(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        """One call for all. A small one goes on, within bounds, when its asker leaves."""
        if sum(end - start for _, start, end in ranges) > _MAX_LEFTOVER_BYTES:
            return await self._judged_batch(ranges)
        task = asyncio.create_task(self._judged_batch(ranges))
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if len(self._leftovers) < self._max_leftovers:
                self._leftovers.add(task)
                task.add_done_callback(self._leftovers.discard)
            else:
                task.cancel()
                await asyncio.wait([task])
            raise
        return task.result()

    async def _judged_batch(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        """A batch of which nothing was answered is one failure."""
        answers: list[bytes | StoreError] = []
        try:
            with self._verdict(0, *{part.name for part in ranges}):
                answers = await self._inner.get_ranges(ranges)
                if (failure := _common_failure(answers)) is not None:
                    raise failure
        except StoreError as exc:
            return answers or [exc] * len(ranges)
        return answers

    async def _watched(
        self,
        verb: Callable[Arguments, Awaitable[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        with self._verdict(0, *(name for name in args[:1] if isinstance(name, str))):
            return await verb(*args, **kwargs)

    async def _hedged(
        self, call: Callable[[], Awaitable[Result]], num_bytes: int, name: str
    ) -> Result:
        with self._verdict(num_bytes, name):
            started = self._clock()
            delay = self._hedges.delay_seconds(num_bytes)
            result = await (call() if delay is None else self._race(call, delay))
            self._hedges.record(num_bytes, self._clock() - started)
            return result

    async def _race(self, call: Callable[[], Awaitable[Result]], delay_seconds: float) -> Result:
        """The first answer of a read and, if that takes longer than the delay, a second one.

        One that fails is no answer while the other may still give one.
        """
        first = asyncio.ensure_future(call())
        reads = [first]
        try:
            done, _ = await asyncio.wait(reads, timeout=delay_seconds)
            if done or not self._hedges.take():
                return await first
            self._observe("hedge")
            reads.append(asyncio.ensure_future(call()))
            pending = set(reads)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                answered = [read for read in done if read.exception() is None]
                if answered:
                    if first not in answered:
                        self._observe("hedge_won")
                    return answered[0].result()
            return await first  # both failed
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    @contextmanager
    def _verdict(self, num_bytes: int, *names: str) -> Iterator[None]:
        """Ask the breaker before, and tell it afterwards how the call went.

        A store that is full or asks for fewer calls answers. One object that hangs again and again
        while others are answered says nothing of the store either.
        """
        started = self._clock()
        ticket = self.breaker.admit(started)
        if ticket is None:
            self._observe("refused")
            raise StoreUnavailableError(
                "the store failed too often lately and is asked again in"
                f" {self.breaker.wait_seconds(started):.1f} s; is it up and reachable?"
            )
        try:
            yield
        except (ChunkNotFoundError, StoreFullError):
            self._note_success(ticket)
            raise
        except StoreThrottledError:
            self._observe("throttled")
            self.breaker.abandoned(ticket)
            raise
        except StoreTimeoutError:
            if self._slow_names.are_alone(names):
                self.breaker.abandoned(ticket)
            else:
                self._note_failure(ticket)
            raise
        except StoreError:
            self._note_failure(ticket)
            raise
        except BaseException:  # cancelled: that says something only of a call that was very late
            stalled = self._hedges.stalled_seconds(num_bytes)
            if stalled is not None and self._clock() - started > stalled:
                self._note_failure(ticket)
            else:
                self.breaker.abandoned(ticket)
            raise
        self._slow_names.answered(names)
        self._note_success(ticket)

    def _note_success(self, ticket: int) -> None:
        before = self.breaker.state
        self.breaker.succeeded(ticket)
        if before != "closed" and self.breaker.state == "closed":
            self._observe("closed")

    def _note_failure(self, ticket: int) -> None:
        self._observe("failure")
        before = self.breaker.state
        self.breaker.failed(ticket, self._clock())
        if before != "open" and self.breaker.state == "open":
            self._observe("opened")


class _SlowNames:
    """Names whose calls timed out, and whether others were answered since."""

    def __init__(self) -> None:
        self._num_answered = 0
        self._since: dict[str, int] = {}

    def are_alone(self, names: Sequence[str]) -> bool:
        """A call for these names timed out: whether all did before, and others were answered since."""
        alone = bool(names) and all(
            self._num_answered > self._since.get(name, self._num_answered) for name in names
        )
        for name in names:
            self._since.setdefault(name, self._num_answered)
            if len(self._since) > _MAX_SLOW_NAMES:
                del self._since[next(iter(self._since))]
        return alone

    def answered(self, names: Sequence[str]) -> None:
        """A call for these names was answered."""
        self._num_answered += 1
        for name in names:
            self._since.pop(name, None)


def _common_failure(answers: Sequence[bytes | StoreError]) -> StoreError | None:
    """The error of a batch in which nothing was answered; None where something was."""
    failure = None
    for answer in answers:
        if not isinstance(answer, StoreError) or isinstance(answer, ChunkNotFoundError):
            return None
        failure = answer
    return failure
