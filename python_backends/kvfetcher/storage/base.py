"""What a store is: one Protocol per verb, so that a function asks for exactly the power it needs.

Contract of every backend (``tests/support/stores.py`` holds them to it):

* Names are ``/``-separated segments of ``A-Z a-z 0-9 . _ -`` that do not start with a dot, at most
  `MAX_NAME_CHARS` characters in all; anything else is a `StoreError` before any I/O.
* Ranges are half-open: ``[start, end)``, in bytes. An empty or negative range is a `StoreError`.
* An object is visible only when whole, and never changes: a second `put` of a name is a no-op.
* `head` answers None for a missing object; `get` and `get_range` raise `ChunkNotFoundError`.
* No call takes longer than the store's timeout, and a second more for each MB that it names
  (`allowed_seconds`; `get` names none); then `StoreTimeoutError`. A put that timed out may still
  become visible later.
* Everything else that goes wrong is a `StoreError` that names the object and the remedy.
* Calls may run at once from one event loop. No order is promised between them.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvfetcher.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

MAX_NAME_CHARS = 200

SINGLE_LOOKUP_BATCH = 32
"""`GetRanges.lookup_batch_size` of stores that read each range by a request of its own."""

MIN_BYTES_PER_SECOND = 1_000_000
"""A transfer that is slower counts as one that makes no progress."""

MAX_OBJECT_BYTES = 1 << 30

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_PREFIX = re.compile(rf"(?:{_NAME.pattern}/?)?")
_FLAT = re.compile(r"([A-Za-z0-9._-]+)\.[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store knows of an object without reading it.

    Attributes:
        name: object name.
        num_bytes: size.
        modified_time_seconds: when it became visible, seconds since the epoch.
    """

    name: str
    num_bytes: int
    modified_time_seconds: float


@dataclass(frozen=True, slots=True)
class SetAside:
    """A corrupt object that lies aside.

    Attributes:
        info: name that it had, size; when it was put, or set aside where the store knows only that.
        place: where it lies, in the store's own words.
    """

    info: ObjectInfo
    place: str


class ByteRange(NamedTuple):
    """Bytes ``[start, end)`` of the object `name`."""

    name: str
    start: int
    end: int


class Get(Protocol):
    """Read whole objects."""

    async def get(self, name: str) -> bytes:
        """The whole object.

        Raises:
            ChunkNotFoundError: no such object.
            StoreError: anything else.
        """
        ...


class GetRange(Protocol):
    """Read parts of objects."""

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)``.

        Shorter than asked exactly where the object ends before `end`; empty where it ends at or
        before `start`. (A first read of unknown length needs this.)

        Raises:
            ChunkNotFoundError: no such object.
            StoreError: ``not 0 <= start < end``, or anything else.
        """
        ...


class GetRanges(Protocol):
    """Read parts of many objects in as few round trips as the store allows."""

    @property
    def lookup_batch_size(self) -> int:
        """Headers that one `get_ranges` carries in about one round trip; more are better split.

        Above `SINGLE_LOOKUP_BATCH` the store answers them all in one request, and one that is not
        there costs next to nothing: ask for so many from the start. Up to it each is a request of
        its own: begin with few, for most look-ups of a cold store end at the first.
        """
        ...

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        """What `get_range` would answer for each of `ranges`, in their order.

        A range that fails is an answer too, so that one lost object does not cost the others: the
        `StoreError` that `get_range` would raise, `ChunkNotFoundError` for a missing object. Where
        the store fails for all of them, each answer is that error.

        Raises:
            StoreError: a name or range that breaks the rules; nothing was read.
        """
        ...


class Head(Protocol):
    """Ask about objects."""

    async def head(self, name: str) -> ObjectInfo | None:
        """Size and time of the object; None where there is none."""
        ...


class Put(Protocol):
    """Store objects."""

    async def put(self, name: str, data: bytes) -> bool:
        """Store `data` under `name`, all or nothing.

        Returns:
            True if this call made the object; False if it was there before, unchanged (of two
            writers at once exactly one gets True where the backend can tell).
        """
        ...


class Delete(Protocol):
    """Remove objects."""

    async def delete(self, name: str) -> None:
        """Remove the object; a missing one is no error."""
        ...


class ListPrefix(Protocol):
    """List objects."""

    def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """Objects whose name starts with `prefix` (text, not folders), in order of name.

        Objects that come or go meanwhile may or may not be listed. Quarantined and half-written
        objects never are.
        """
        ...


class Quarantine(Protocol):
    """Set corrupt objects aside."""

    async def quarantine(self, name: str, reason: str) -> None:
        """Set a corrupt object aside: the name is free again, the bytes and `reason` are kept.

        A missing object is no error (somebody else was first).
        """
        ...


class ListQuarantined(Protocol):
    """List the quarantine."""

    def list_quarantined(self) -> AsyncIterator[SetAside]:
        """All objects that lie aside, in no order; several may have had one name.

        Chunks are told by the name that they had. Of other objects, those with ``_`` in their name
        may be told with ``/`` in its place, or not at all.
        """
        ...


class DeleteQuarantined(Protocol):
    """Remove an object from the quarantine."""

    async def delete_quarantined(self, aside: SetAside) -> None:
        """Remove it and its reason; a missing one is no error."""
        ...


class LocalCopies(Protocol):
    """Say what can be read without the network; only stores with a tier have it."""

    async def are_local(self, ranges: Sequence[ByteRange]) -> list[bool]:
        """Whether the tier on this host holds the answer now, for each of `ranges`.

        No promise: a copy may go before the range is read. Costs no network.

        Raises:
            StoreError: a name or range that breaks the rules.
        """
        ...


class Store(
    Get,
    GetRange,
    GetRanges,
    Head,
    Put,
    Delete,
    ListPrefix,
    Quarantine,
    ListQuarantined,
    DeleteQuarantined,
    Protocol,
):
    """All verbs; what `open_store` returns."""

    async def close(self) -> None:
        """Give connections back. No call may follow."""
        ...


def flat_name(name: str, suffix: str) -> str:
    """A name without ``/`` for a quarantined object; see `name_of_flat`."""
    return f"{name.replace('/', '_')}.{suffix}"


def name_of_flat(flat: str) -> str | None:
    """The name that `flat_name` was given, if that had no ``_``; None where it made no such."""
    match = _FLAT.fullmatch(flat)
    name = match[1].replace("_", "/") if match else ""
    return name if is_name(name) else None


async def get_ranges_singly(
    store: GetRange, ranges: Sequence[ByteRange], *, max_concurrency: int
) -> list[bytes | StoreError]:
    """`GetRanges.get_ranges` for a store that has no batched read: one call per range.

    Args:
        store: where the objects are.
        ranges: what to read.
        max_concurrency: calls that run at one time.

    Raises:
        StoreError: a name or range that breaks the rules; nothing was read.
    """
    check_ranges(ranges)
    places = asyncio.Semaphore(max_concurrency)

    async def read(part: ByteRange) -> bytes | StoreError:
        async with places:
            try:
                return await store.get_range(*part)
            except StoreError as exc:
                return exc

    return await asyncio.gather(*map(read, ranges))


def allowed_seconds(timeout_seconds: float, num_bytes: int) -> float:
    """Longest wait for a call that carries `num_bytes`.

    Over 0.05 Gbit/s that several calls share, an object of 60 MB takes longer than any timeout that
    tells a dead store soon.
    """
    return timeout_seconds + min(num_bytes, MAX_OBJECT_BYTES) / MIN_BYTES_PER_SECOND


def is_name(text: str) -> bool:
    """Whether `text` follows the rule for names of this module's head."""
    return len(text) <= MAX_NAME_CHARS and _NAME.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Return `name` if it follows the rule of this module's head.

    Raises:
        StoreError: it does not.
    """
    if not is_name(name):
        raise StoreError(
            f"object name {name!r} is not allowed: segments of A-Z a-z 0-9 . _ - joined by '/',"
            f" none starting with a dot, at most {MAX_NAME_CHARS} characters"
        )
    return name


def check_prefix(prefix: str) -> str:
    """Return `prefix` if a name can start with it ("" and a trailing "/" are allowed).

    Raises:
        StoreError: no name can.
    """
    if len(prefix) > MAX_NAME_CHARS or not _PREFIX.fullmatch(prefix):
        raise StoreError(f"prefix {prefix!r} cannot start an object name")
    return prefix


def check_range(name: str, start: int, end: int) -> None:
    """Check a half-open range.

    Raises:
        StoreError: ``not 0 <= start < end``.
    """
    if not 0 <= start < end:
        raise StoreError(f"range [{start}, {end}) of object {name} is empty or negative")


def check_ranges(ranges: Sequence[ByteRange]) -> None:
    """Check every name and range of a batch.

    Raises:
        StoreError: one of them breaks the rules.
    """
    for name, start, end in ranges:
        check_range(check_name(name), start, end)
