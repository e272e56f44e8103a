"""Reads of a store, each range once at a time however many ask for it. One event loop.

A read runs as a task of its own: one asker's cancellation does not hurt the others, the last one's
cancels the read. Nothing is kept once it is answered (a local tier does that). The link's estimator
sees every transfer begin and end, but for those that copies on this host answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvfetcher.errors import StoreError
from kvfetcher.storage.base import ByteRange, GetRange, GetRanges

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from kvfetcher.fetch.planning.bandwidth import LinkEstimator
    from kvfetcher.storage.base import LocalCopies

Answers = dict[ByteRange, "bytes | StoreError"]


class RangeStore(GetRange, GetRanges, Protocol):
    """The verbs that reading takes."""


@dataclass(slots=True)
class Tally:
    """What one caller read; a shared read counts for the caller that began it."""

    num_reads: int = 0
    num_bytes: int = 0

    def add(self, answer: bytes | StoreError) -> None:
        if not isinstance(answer, StoreError):
            self.num_reads += 1
            self.num_bytes += len(answer)


@dataclass(eq=False, slots=True)
class _Read:
    """One call of the store; `askers` wait for it."""

    parts: Sequence[ByteRange]
    task: asyncio.Task[Answers]
    askers: int = 0


class SharedReads:
    """See the module's text.

    Args:
        store: what to read from.
        link: learns from the transfers.
        local: says which reads of `store` need no network; None = none.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: RangeStore,
        *,
        link: LinkEstimator,
        clock: Callable[[], float],
        local: LocalCopies | None = None,
    ) -> None:
        self._store = store
        self._link = link
        self._local = local
        self._clock = clock
        self._running: dict[ByteRange, _Read] = {}

    @property
    def lookup_batch_size(self) -> int:
        """The store's; see `GetRanges.lookup_batch_size`."""
        return self._store.lookup_batch_size

    async def read(self, part: ByteRange, tally: Tally) -> bytes:
        """`GetRange.get_range`.

        Raises:
            StoreError: the store's.
        """
        is_mine = part not in self._running
        if is_mine:
            self._start([part], self._read_one(part))
        answer = (await self._wait([part]))[part]
        if is_mine:
            tally.add(answer)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    def is_reading(self, part: ByteRange) -> bool:
        """Whether somebody reads exactly this range now."""
        return part in self._running

    async def read_many(self, parts: Sequence[ByteRange], tally: Tally) -> list[bytes | StoreError]:
        """`GetRanges.get_ranges`; what others read already is waited for, the rest is one call.

        Raises:
            StoreError: a name or range that breaks the rules.
        """
        mine = [part for part in parts if part not in self._running]
        if mine:
            self._start(mine, self._read_batch(mine))
        answers = await self._wait(parts)
        for part in mine:
            tally.add(answers[part])
        return [answers[part] for part in parts]

    async def are_local(self, parts: Sequence[ByteRange]) -> list[bool]:
        """Which of `parts` copies on this host would answer."""
        return [False] * len(parts) if self._local is None else await self._local.are_local(parts)

    def _start(self, parts: Sequence[ByteRange], call: Coroutine[None, None, Answers]) -> None:
        read = _Read(parts, asyncio.create_task(call))
        self._running.update((part, read) for part in parts)

        def end(task: asyncio.Task[Answers]) -> None:
            self._forget(read)
            if not task.cancelled():
                task.exception()  # seen: the askers may all be gone

        read.task.add_done_callback(end)

    async def _wait(self, parts: Sequence[ByteRange]) -> Answers:
        reads = {self._running[part]: None for part in parts}
        for read in reads:  # before the first await: nobody may cancel what is asked for here
            read.askers += 1
        try:
            found: Answers = {}
            for read in reads:
                found.update(await asyncio.shield(read.task))
            return found
        finally:
            for read in reads:
                read.askers -= 1
                if not read.askers and not read.task.done():
                    self._forget(read)
                    read.task.cancel()

    def _forget(self, read: _Read) -> None:
        for part in read.parts:
            if self._running.get(part) is read:
                del self._running[part]

    async def _read_one(self, part: ByteRange) -> Answers:
        token = await self._begin([part])
        data = None
        try:
            data = await self._store.get_range(*part)
        except StoreError as exc:
            return {part: exc}
        finally:
            # A short answer is one too, but says nothing of the rate that was asked about.
            self._end(token, ok=data is not None and len(data) == part.end - part.start)
        return {part: data}

    async def _read_batch(self, parts: Sequence[ByteRange]) -> Answers:
        token = await self._begin(parts)
        answers: list[bytes | StoreError] = []
        try:
            answers = await self._store.get_ranges(parts)
        finally:
            is_whole = bool(answers) and all(isinstance(answer, bytes) for answer in answers)
            self._end(token, ok=is_whole)
        return dict(zip(parts, answers, strict=True))

    async def _begin(self, parts: Sequence[ByteRange]) -> int | None:
        """Tell the link of a transfer; None for one that it will not see."""
        local = await self.are_local(parts)
        num_bytes = sum(p.end - p.start for p, n in zip(parts, local, strict=True) if not n)
        return self._link.begin(self._clock(), num_bytes) if num_bytes else None

    def _end(self, token: int | None, *, ok: bool) -> None:
        if token is not None:
            self._link.end(token, self._clock(), ok=ok)
