"""A store with a tier: memory of this process, then a local disk, then the store.

A read that the copies answer asks nothing of the store, so a copy may outlive its object: by
`max_age_seconds` where another host deleted it, not at all where this process did. A copy that
fails, rots or is gone is a miss. Copies are made behind the reader's back; where too many wait to
be written, further ones are not made. A disk of which a call hangs is passed over until that ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, TypeVar

from kvfetcher.errors import StoreError
from kvfetcher.storage.base import check_name, check_range, check_ranges
from kvfetcher.storage.spans import UNBOUNDED, Span, span_of_answer
from kvfetcher.storage.threads import IoThreads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kvfetcher.storage.base import ByteRange, ObjectInfo, SetAside, Store
    from kvfetcher.storage.disk_tier import DiskTier
    from kvfetcher.storage.memory_tier import MemoryTier

MAX_PENDING_BYTES = 256 << 20
"""Copies that wait to be written to the disk, at most."""

TierEvent = Literal["memory_hit", "disk_hit", "near_miss", "copy_dropped", "disk_failure"]
"""What the copies tell their observer, for metrics: reads that they answered or did not, copies not
made because too many waited, and calls of the disk that failed."""

_MAX_REMEMBERED = 65536
# Threads at the disk. Copies have their own, so that no read waits behind them.
_DISK_THREADS = 16
_COPY_THREADS = 4

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class TieredStore:
    """Verbs as in `storage.base`; one event loop.

    `quarantine` of an object of which a copy was served blames the copy: copies go, and the
    store's object is judged by what the next read brings. (The object may have been made anew
    since the copy was taken.)
    """

    def __init__(
        self,
        remote: Store,
        *,
        memory: MemoryTier | None,
        disk: DiskTier | None,
        disk_timeout_seconds: float,
        observe: Callable[[TierEvent], None] = lambda _: None,
    ) -> None:
        """Does no I/O.

        Args:
            remote: the store.
            memory: copies in memory; None = none.
            disk: copies on disk; None = none.
            disk_timeout_seconds: a disk that takes longer is passed over.
            observe: called with each event.
        """
        self._remote = remote
        self._memory = memory
        self._disk = disk
        self._disk_timeout_seconds = disk_timeout_seconds
        self._disk_threads, self._copy_threads = (
            IoThreads("kvfetcher-tier", max_threads=num, max_stuck=1)
            for num in (_DISK_THREADS, _COPY_THREADS)
        )
        self._served: OrderedDict[str, None] = OrderedDict()
        self._drops: OrderedDict[str, int] = OrderedDict()
        self._num_drops = 0
        self._stuck: set[str] = set()  # names whose copies could not be dropped from the disk
        self._pending: set[asyncio.Task[None]] = set()
        self._pending_bytes = 0
        self._observe = observe
        self._disk_has_failed = False

    @property
    def lookup_batch_size(self) -> int:
        """See `GetRanges.lookup_batch_size`."""
        return self._remote.lookup_batch_size

    async def get(self, name: str) -> bytes:
        check_name(name)
        if (copy := await self._local_copy(name, 0, UNBOUNDED)) is not None:
            return copy
        before = self._num_drops
        data = await self._remote.get(name)
        self._keep(name, Span(0, len(data), is_last=True), data, before)
        return data

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        check_range(check_name(name), start, end)
        if (copy := await self._local_copy(name, start, end)) is not None:
            return copy
        before = self._num_drops
        data = await self._remote.get_range(name, start, end)
        self._keep(name, span_of_answer(start, end, len(data)), data, before)
        return data

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        check_ranges(ranges)
        copies = await asyncio.gather(*(self._local_copy(*part) for part in ranges))
        wanted = [part for part, copy in zip(ranges, copies, strict=True) if copy is None]
        if not wanted:
            return [copy for copy in copies if copy is not None]
        before = self._num_drops
        answers = await self._remote.get_ranges(wanted)
        for part, answer in zip(wanted, answers, strict=True):
            if not isinstance(answer, StoreError):
                span = span_of_answer(part.start, part.end, len(answer))
                self._keep(part.name, span, answer, before)
        rest = iter(answers)
        return [next(rest) if copy is None else copy for copy in copies]

    async def are_local(self, ranges: Sequence[ByteRange]) -> list[bool]:
        """See `LocalCopies.are_local`."""
        check_ranges(ranges)
        memory, disk = self._memory, self._disk
        found = [memory is not None and memory.holds(*part) for part in ranges]
        if disk is None or all(found):
            return found
        rest = [i for i, part in enumerate(ranges) if not found[i] and part.name not in self._stuck]
        held = await self._on_disk(lambda: [i for i in rest if disk.holds(*ranges[i])])
        for i in held or ():
            found[i] = True
        return found

    async def head(self, name: str) -> ObjectInfo | None:
        return await self._remote.head(name)

    async def put(self, name: str, data: bytes) -> bool:
        before = self._num_drops
        made = await self._remote.put(name, data)
        if made:  # likely to be asked for on this host next; memory is for what was asked for
            self._keep_on_disk(name, Span(0, len(data), is_last=True), data, before)
        return made

    async def delete(self, name: str) -> None:
        await self._forget(check_name(name))
        await self._remote.delete(name)
        await self._forget(name)  # what was read meanwhile

    async def quarantine(self, name: str, reason: str) -> None:
        was_served = check_name(name) in self._served
        await self._forget(name)
        if was_served:
            _log.warning("dropped the local copy of object %s: %s", name, reason)
            return
        await self._remote.quarantine(name, reason)
        await self._forget(name)

    def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        return self._remote.list_prefix(prefix)

    def list_quarantined(self) -> AsyncIterator[SetAside]:
        return self._remote.list_quarantined()

    async def delete_quarantined(self, aside: SetAside) -> None:
        await self._remote.delete_quarantined(aside)

    async def forget(self, is_match: Callable[[str], bool]) -> int:
        """Drop the copies of all objects whose name matches, whatever the store holds.

        Returns:
            How many objects had copies.
        """
        await self.drained()
        names = set(self._memory.names() if self._memory is not None else ())
        if self._disk is not None:
            names.update(await self._on_disk(self._disk.names) or ())
        matching = [name for name in names if is_match(name)]
        for name in matching:
            await self._forget(name)
        return len(matching)

    async def drained(self) -> None:
        """Return when the copies that wait to be written are written."""
        while self._pending:
            await asyncio.wait(self._pending)

    async def close(self) -> None:
        await self.drained()
        await self._remote.close()

    async def _local_copy(self, name: str, start: int, end: int) -> bytes | None:
        """The answer out of the copies; None where they do not hold it."""
        if self._memory is not None:
            copy = self._memory.get(name, start, end)
            if copy is not None:
                self._observe("memory_hit")
                self._remember(self._served, name, None)
                return copy
        disk = self._disk
        if disk is not None and name not in self._stuck:
            before = self._num_drops
            copy = await self._on_disk(lambda: disk.get(name, start, end))
            if copy is not None and self._drops.get(name, 0) <= before:
                self._observe("disk_hit")
                self._remember(self._served, name, None)
                return copy  # not copied to memory: the system's page cache has it already
        self._observe("near_miss")
        return None

    def _keep(self, name: str, span: Span, data: bytes, before: int) -> None:
        """Copy what the store answered, unless the object was dropped since `before`."""
        if not data and span.start:
            return  # the object ends before this, which does not tell where
        if self._memory is not None and self._drops.get(name, 0) <= before:
            self._memory.add(name, span, data)
        self._keep_on_disk(name, span, data, before)

    def _keep_on_disk(self, name: str, span: Span, data: bytes, before: int) -> None:
        if self._disk is None:
            return
        if self._pending_bytes + len(data) > MAX_PENDING_BYTES:
            self._observe("copy_dropped")
            return
        self._pending_bytes += len(data)
        task = asyncio.create_task(self._write(self._disk, name, span, data, before))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _write(self, disk: DiskTier, name: str, span: Span, data: bytes, before: int) -> None:
        try:
            if self._drops.get(name, 0) <= before:
                await self._on_disk(lambda: disk.add(name, span, data), self._copy_threads)
            if self._drops.get(name, 0) > before:  # dropped while it was written
                await self._drop_on_disk(disk, name)
        finally:
            self._pending_bytes -= len(data)

    async def _forget(self, name: str) -> None:
        """Drop the copies; what is being read or written of them now will not be kept."""
        self._num_drops += 1
        self._remember(self._drops, name, self._num_drops)
        self._served.pop(name, None)
        if self._memory is not None:
            self._memory.drop(name)
        if self._disk is not None:
            await self._drop_on_disk(self._disk, name)

    async def _drop_on_disk(self, disk: DiskTier, name: str) -> None:
        if await self._on_disk(lambda: disk.drop(name)) is None:
            self._stuck.add(name)  # never read from there again by this process
        else:
            self._stuck.discard(name)

    async def _on_disk(self, call: Callable[[], _T], threads: IoThreads | None = None) -> _T | None:
        """Run disk work in a thread; None where it fails, takes too long, or other work hangs."""
        try:
            return await (threads or self._disk_threads).run(
                call, timeout_seconds=self._disk_timeout_seconds
            )
        except OSError as exc:  # TimeoutError is one
            self._observe("disk_failure")
            level = logging.DEBUG if self._disk_has_failed else logging.WARNING
            self._disk_has_failed = True
            _log.log(level, "local copies on disk are passed over: %s", exc or "it took too long")
            return None

    def _remember(self, where: OrderedDict[str, _T], name: str, value: _T) -> None:
        """Keep a fact about one of the last `_MAX_REMEMBERED` names."""
        where[name] = value
        where.move_to_end(name)
        if len(where) > _MAX_REMEMBERED:
            where.popitem(last=False)
