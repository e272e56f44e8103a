"""Look through a store and put it in order: survey, remove, verify, warm.

Each takes `tell`, called now and then with one line about how far it is. Objects are handled a
batch at a time, so memory is bounded but for the survey's own result.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvfetcher.errors import ChunkNotFoundError, FormatError, StoreError
from kvfetcher.format import container
from kvfetcher.format.keys import model_digits, next_key, parse_object_name
from kvfetcher.storage.admin.reachability import Holding, Survey
from kvfetcher.storage.base import ByteRange
from kvfetcher.storage.spans import UNBOUNDED

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence

    from kvfetcher.format.container import ChunkHeader
    from kvfetcher.format.keys import NameParts
    from kvfetcher.storage.base import (
        Delete,
        DeleteQuarantined,
        GetRange,
        GetRanges,
        ListPrefix,
        LocalCopies,
        ObjectInfo,
        SetAside,
    )

    Tell = Callable[[str], None]

    class Surveyed(GetRange, GetRanges, ListPrefix, Protocol):
        """What a survey asks of a store."""

    class Removing(Delete, DeleteQuarantined, Protocol):
        """What removing asks of a store."""

    class Warmable(GetRange, LocalCopies, Protocol):
        """What warming asks of a store."""

        async def drained(self) -> None:
            """Return when the copies that wait to be written are written."""
            ...


_HEADER_BATCH = 64
_DELETE_BATCH = 64
# Whole objects in memory at one time; a chunk is at most 1 GiB, usually a few MB.
_READ_BATCH = 4

_T = TypeVar("_T")


@dataclass(slots=True)
class Removal:
    """What became of objects that were to be removed.

    Attributes:
        removed: how many are gone.
        num_bytes: theirs.
        failed: object name, or place of what lay aside -> why it could not be removed.
    """

    removed: int = 0
    num_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Warming:
    """What was brought near.

    Attributes:
        objects: how many lie near whole.
        num_bytes: their bytes.
        is_full: more would not have fitted; the rest was left.
        failed: object name -> why it could not be read, or does not lie near although it was.
    """

    objects: int = 0
    num_bytes: int = 0
    is_full: bool = False
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Verification:
    """What a check of whole objects found.

    Attributes:
        sound: chunks whose every digest holds.
        num_bytes: bytes read.
        damaged: object name -> what is wrong.
        others: objects that are not named as chunks; not read.
        failed: object name -> why it could not be read.
    """

    sound: int = 0
    num_bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    others: int = 0
    failed: dict[str, str] = field(default_factory=dict)


async def survey(store: Surveyed, prefix: str, *, with_tokens: bool = False, tell: Tell) -> Survey:
    """Names and headers of all objects whose name starts with `prefix`.

    Raises:
        StoreError: the store failed. (What could not be read must not count as missing.)
    """
    found = Survey()
    async for batch in _batches(store.list_prefix(prefix), _HEADER_BATCH):
        named = [(info, parse_object_name(info.name)) for info in batch]
        found.others += [info for info, parts in named if parts is None]
        chunks = [(info, parts) for info, parts in named if parts is not None]
        answers = await store.get_ranges(
            [ByteRange(info.name, 0, container.HEADER_READ_BYTES) for info, _ in chunks]
        )
        for (info, parts), answer in zip(chunks, answers, strict=True):
            try:
                header = await _read_header(store, info.name, answer)
                _check_name(parts, header)
            except ChunkNotFoundError:
                continue  # it went meanwhile
            except FormatError as exc:
                found.damaged.append((info, str(exc)))
                continue
            found.chunks.append(
                Holding(
                    info,
                    parts.scope,
                    header.chunk_key,
                    header.parent_key,
                    header.first_position,
                    header.token_ids if with_tokens else (),
                )
            )
        tell(f"looked at {len(found.chunks) + len(found.damaged) + len(found.others)} objects")
    return found


async def remove(
    store: Removing, objects: Sequence[ObjectInfo], asides: Sequence[SetAside], *, tell: Tell
) -> Removal:
    """Delete objects, the last ones first, then what lies aside; a failure keeps no other."""
    result = Removal()

    async def delete(what: str, num_bytes: int, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except StoreError as exc:
            result.failed[what] = str(exc)
        else:
            result.removed += 1
            result.num_bytes += num_bytes

    calls = [
        (info.name, info.num_bytes, partial(store.delete, info.name)) for info in reversed(objects)
    ]
    calls += [
        (aside.place, aside.info.num_bytes, partial(store.delete_quarantined, aside))
        for aside in asides
    ]
    for start in range(0, len(calls), _DELETE_BATCH):
        batch = calls[start : start + _DELETE_BATCH]
        await asyncio.gather(*(delete(*call) for call in batch))
        tell(f"removed {result.removed} of {len(calls)} objects")
    return result


async def verify(
    store: GetRange, objects: AsyncIterable[ObjectInfo], *, tell: Tell
) -> Verification:
    """Read chunks whole and check every digest in them, and that their names are theirs.

    One is read again once before it counts as damaged, because what came damaged need not be
    damaged where it lies.
    """
    result = Verification()

    async def check_once(info: ObjectInfo, parts: NameParts) -> None:
        data = await _read_whole(store, info)
        result.num_bytes += len(data)
        await asyncio.to_thread(_check_chunk, parts, data)

    async def check(info: ObjectInfo) -> None:
        parts = parse_object_name(info.name)
        if parts is None:
            result.others += 1
            return
        try:
            try:
                await check_once(info, parts)
            except FormatError:
                await check_once(info, parts)
        except ChunkNotFoundError:
            return  # it went meanwhile
        except StoreError as exc:
            result.failed[info.name] = str(exc)
        except FormatError as exc:
            result.damaged[info.name] = str(exc)
        else:
            result.sound += 1

    async for batch in _batches(objects, _READ_BATCH):
        await asyncio.gather(*map(check, batch))
        tell(
            f"{result.sound} chunks sound, {len(result.damaged)} damaged,"
            f" {result.num_bytes / 1e6:.0f} MB read"
        )
    return result


async def warm(
    store: Warmable, objects: AsyncIterable[ObjectInfo], *, max_bytes: int, tell: Tell
) -> Warming:
    """Read objects whole, so that the tier holds them, up to `max_bytes` in all.

    A read may leave no copy (too many waited to be written, the disk failed), so each batch waits
    for its copies, and only what lies near then counts.
    """
    result = Warming()

    async def read(info: ObjectInfo) -> bool:
        try:
            await _read_whole(store, info)
        except ChunkNotFoundError:
            return False  # it went meanwhile
        except StoreError as exc:
            result.failed[info.name] = str(exc)
            return False
        return True

    async for batch in _batches(objects, _READ_BATCH):
        if result.num_bytes + sum(info.num_bytes for info in batch) > max_bytes:
            result.is_full = True
            break
        came = await asyncio.gather(*map(read, batch))
        infos = [info for info, has_come in zip(batch, came, strict=True) if has_come]
        await store.drained()
        local = await store.are_local([ByteRange(info.name, 0, UNBOUNDED) for info in infos])
        for info, is_local in zip(infos, local, strict=True):
            if is_local:
                result.objects += 1
                result.num_bytes += info.num_bytes
            else:
                result.failed[info.name] = "no copy of it was kept; is the disk full or failing?"
        tell(f"{result.objects} objects near, {result.num_bytes / 1e6:.0f} MB")
    return result


async def _read_whole(store: GetRange, info: ObjectInfo) -> bytes:
    """All of an object, by a range: its length tells a store how long the call may take.

    A byte more than there is, so that the answer tells copies near by where the object ends.
    """
    return await store.get_range(info.name, 0, info.num_bytes + 1)


def _check_chunk(parts: NameParts, data: bytes) -> None:
    """Check a whole chunk object.

    Raises:
        FormatError: what is wrong with it.
    """
    header = container.parse_header(data)
    _check_name(parts, header)
    if len(data) != header.object_bytes:
        raise FormatError(
            f"the object has {len(data)} bytes, its header says {header.object_bytes}"
        )
    for entry in header.units:
        container.check_unit(header, entry, data[entry.offset : entry.stop])


def _check_name(parts: NameParts, header: ChunkHeader) -> None:
    """Check that a chunk lies under its own name.

    Raises:
        FormatError: it does not, or its key does not follow from its tokens.
    """
    if header.chunk_key != parts.key:
        raise FormatError("the chunk's key differs from the object's name")
    if model_digits(header.identity) != parts.model:
        raise FormatError("the chunk's identity differs from the object's name")
    if next_key(header.parent_key, header.token_ids) != header.chunk_key:
        raise FormatError("the chunk's key does not follow from its tokens")


async def _read_header(store: GetRange, name: str, answer: bytes | StoreError) -> ChunkHeader:
    if isinstance(answer, StoreError):
        raise answer
    needed = container.header_size(answer)
    if needed > len(answer):
        answer += await store.get_range(name, len(answer), needed)
    return container.parse_header(answer)


async def _batches(items: AsyncIterable[_T], size: int) -> AsyncIterator[list[_T]]:
    batch: list[_T] = []
    async for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
