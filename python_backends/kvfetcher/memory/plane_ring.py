"""Decoded planes that stay on the GPU between `kv_decode` and `kv_restore`: a ring over CUDA IPC.

Each decoding process owns one piece of GPU memory and a small file in /dev/shm with a table of
tickets. It decodes a unit into a free part of the memory, notes a fresh ticket there, and hands out
a `PlaneTicket`; the restoring process opens the memory once, reads the planes, and clears the ticket.
A part whose ticket nobody clears (its request was cancelled between the two models) is taken back
after `expiry_seconds`; a reader that comes later than that sees another ticket, and is refused.

Tables are read and written without locks: one process sets a ticket, one clears it, and 8 aligned
bytes are stored at once. File: 4096 bytes, 64 tickets (uint64, 0 = free).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import mmap
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import GpuError, LayoutError
from kvfetcher.memory.cuda import IPC_HANDLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.memory.cuda import CudaContext

NUM_TICKETS = 64
_TABLE_BYTES = 4096
# Picture rows and tensor cores want aligned starts; CUDA's own allocations have as much.
_ALIGNMENT = 512
_POLL_SECONDS = 0.0002
# How often a reader looks for owners that died: each holds GPU memory until then.
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PlaneTicket:
    """Where one unit's planes lie. ``shift``: number of bits by which samples are shifted up."""

    table: str
    """Path of the owner's table."""
    gpu: int
    handle: str
    """CUDA IPC handle of the owner's memory, hex."""
    event: str
    """CUDA IPC handle of the event after which the planes are there, hex."""
    owner: int
    entry: int
    ticket: int
    offset: int
    num_bytes: int
    shift: int

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in self.__slots__}  # half of `asdict`'s time
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PlaneTicket:
        """Parse.

        Raises:
            LayoutError: the text is not a ticket.
        """
        try:
            made = cls(**json.loads(text))
            _check_ring(made.table, made.handle, made.event)
            numbers = (made.gpu, made.owner, made.entry, made.ticket, made.offset, made.num_bytes)
            if not all(type(n) is int and n >= 0 for n in (*numbers, made.shift)):
                raise ValueError("a number is not an integer of at least 0")
            if made.entry >= NUM_TICKETS or made.shift > 8:
                raise ValueError("a number is out of range")
        except (ValueError, TypeError, RecursionError) as exc:
            raise LayoutError(f"planes_at must be a plane ticket, got {text[:80]!r}") from exc
        return made


@functools.lru_cache(maxsize=NUM_TICKETS)
def _check_ring(table: str, handle: str, event: str) -> None:
    """Kept, for all tickets of a ring say the same."""
    if {len(bytes.fromhex(h)) for h in (handle, event)} != {IPC_HANDLE_BYTES}:
        raise ValueError("a handle has another length")
    if not isinstance(table, str):
        raise TypeError("the table is not a path")


@dataclass(slots=True)
class _Part:
    """An outstanding part of the ring."""

    entry: int
    offset: int
    end: int
    expires_at: float


class PlaneRing:
    """The decoding side. Not thread-safe.

    Args:
        context: context of the GPU.
        num_bytes: number of bytes of GPU memory.
        table: path of the table file to make; a name that no other process uses.
        expiry_seconds: after it, planes that nobody fetched are overwritten.
        clock: seconds, monotonic.

    Raises:
        GpuError: the GPU lacks the memory, or the file cannot be made.
    """

    def __init__(
        self,
        context: CudaContext,
        num_bytes: int,
        *,
        table: Path,
        expiry_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._num_bytes = num_bytes
        self._expiry_seconds = expiry_seconds
        self._clock = clock
        self._parts: list[_Part] = []
        self._address = self._event = 0
        self._table = _Table.create(table)
        try:
            self._address = context.allocate(num_bytes)
            self._handle = context.share(self._address).hex()
            self._event = context.new_event()
            self._event_handle = context.share_event(self._event).hex()
        except GpuError:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """Size of its memory; larger planes never fit."""
        return self._num_bytes

    def reserve(self, num_bytes: int, *, shift: int, wait_seconds: float) -> PlaneTicket | None:
        """Room for planes, or None where none became free in time (or the ring is too small).

        The caller gives copies to `address_of` to the GPU, calls `written`, and hands the ticket
        to the reader.
        """
        if num_bytes > self._num_bytes:
            return None
        deadline = self._clock() + wait_seconds
        while (place := self._find(num_bytes)) is None:
            if self._clock() >= deadline:
                return None
            time.sleep(_POLL_SECONDS)
        entry, offset = place
        # Over JSON and numpy as a signed number: 62 bits.
        ticket = secrets.randbits(62) | 1
        self._table.tickets[entry] = ticket
        end = offset + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        expires_at = self._clock() + self._expiry_seconds
        self._parts.append(_Part(entry, offset, end, expires_at))
        return PlaneTicket(
            table=str(self._table.path),
            gpu=self._context.gpu,
            handle=self._handle,
            event=self._event_handle,
            owner=os.getpid(),
            entry=entry,
            ticket=ticket,
            offset=offset,
            num_bytes=num_bytes,
            shift=shift,
        )

    def address_of(self, ticket: PlaneTicket) -> int:
        """Where to write the planes of a ticket of this ring."""
        return self._address + ticket.offset

    def written(self) -> None:
        """Let readers see what the default stream holds now: they wait on the GPU, nobody here.

        One event serves all tickets: a later record only makes an early reader wait a little more.
        """
        self._context.record(self._event)

    def cancel(self, ticket: PlaneTicket) -> None:
        """Take a ticket back that was not handed out."""
        self._table.clear(ticket)

    def close(self) -> None:
        """Free memory and file. Readers keep what they opened until they let go of it."""
        if not self._table.is_open:
            return
        # A lost context refuses, and its process is about to end.
        with contextlib.suppress(GpuError):
            if self._event:
                self._context.free_event(self._event)
            if self._address:
                self._context.free(self._address)
        self._table.close()
        self._table.path.unlink(missing_ok=True)

    def _find(self, num_bytes: int) -> tuple[int, int] | None:
        """A free entry and the first gap of that size."""
        now, tickets = self._clock(), self._table.tickets
        for part in self._parts:
            if part.expires_at <= now:
                tickets[part.entry] = 0
        self._parts = sorted((p for p in self._parts if tickets[p.entry]), key=lambda p: p.offset)
        entry = next((i for i in range(NUM_TICKETS) if not tickets[i]), None)
        if entry is None:
            return None
        start = 0
        for part in self._parts:
            if part.offset - start >= num_bytes:
                break
            start = part.end
        return (entry, start) if self._num_bytes - start >= num_bytes else None


class PlaneReader:
    """The restoring side: rings stay open from call to call. Thread-safe.

    Args:
        context_of: GPU index -> context.
    """

    def __init__(self, context_of: Callable[[int], CudaContext]) -> None:
        self._context_of = context_of
        self._rings: dict[str, _OpenRing] = {}
        self._looked_at = 0.0
        self._lock = threading.Lock()

    def address(self, ticket: PlaneTicket) -> int:
        """Where the planes of a ticket lie in this process.

        They are there for work that the default stream gets from now on.

        Raises:
            GpuError: they were overwritten, or their owner is gone.
        """
        with self._lock:
            ring = self._rings.get(ticket.table)
            if ring is None or ring.handle != ticket.handle:
                self._drop(ticket.table)
                self._drop_dead()
                ring = self._rings[ticket.table] = self._open(ticket)
            if int(ring.table.tickets[ticket.entry]) != ticket.ticket:
                raise GpuError(
                    "decoded planes were overwritten before they were restored; try again"
                )
            ring.context.wait_on_gpu(ring.event)
            return ring.address + ticket.offset

    def finish(self, ticket: PlaneTicket) -> None:
        """Give the planes back; they must not be read after this.

        Raises:
            GpuError: they were overwritten while they were read.
        """
        with self._lock:
            ring = self._rings.get(ticket.table)
            if ring is None or not ring.table.clear(ticket):
                raise GpuError(
                    "decoded planes were overwritten while they were restored; try again"
                )
            # An owner that is replaced may die long after its successor's ring was opened.
            if (now := time.monotonic()) - self._looked_at > _LOOK_SECONDS:
                self._looked_at = now
                self._drop_dead()

    def drop(self, ticket: PlaneTicket) -> None:
        """Give planes back that are not wanted after all, read or not."""
        with self._lock:
            ring = self._rings.get(ticket.table)
            if ring is not None:
                ring.table.clear(ticket)
                return
        with contextlib.suppress(GpuError):  # their owner is gone, and they with it
            table = _Table.open(Path(ticket.table))
            table.clear(ticket)
            table.close()

    def close(self) -> None:
        """Let go of all rings."""
        with self._lock:
            for table in list(self._rings):
                self._drop(table)

    def _open(self, ticket: PlaneTicket) -> _OpenRing:
        context = self._context_of(ticket.gpu)
        table = _Table.open(Path(ticket.table))
        try:
            address = context.open_shared(bytes.fromhex(ticket.handle))
        except GpuError:
            table.close()
            raise
        try:
            event = context.open_event(bytes.fromhex(ticket.event))
        except GpuError:
            context.close_shared(address)
            table.close()
            raise
        return _OpenRing(table, address, event, ticket.handle, context)

    def _drop_dead(self) -> None:
        """Let go of the memory of processes that died: the driver keeps it as long as we do."""
        for path, ring in list(self._rings.items()):
            if not ring.table.owner_lives():
                self._drop(path)

    def _drop(self, path: str) -> None:
        ring = self._rings.pop(path, None)
        if ring is not None:
            ring.context.settle()  # units in flight may be read from it
            ring.context.free_event(ring.event)
            ring.context.close_shared(ring.address)
            ring.table.close()


@dataclass(frozen=True, slots=True)
class _OpenRing:
    table: _Table
    address: int
    event: int
    handle: str
    context: CudaContext


class _Table:
    """The tickets of one ring, in a file that its owner holds a lock on."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._memory = mmap.mmap(fd, _TABLE_BYTES)
        self.tickets: Any = np.frombuffer(self._memory, np.uint64, count=NUM_TICKETS)

    @classmethod
    def create(cls, path: Path) -> _Table:
        try:
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.posix_fallocate(fd, 0, _TABLE_BYTES)
        except OSError as exc:
            raise GpuError(f"plane table {path} cannot be made: {exc.strerror}") from exc
        return cls(path, fd)

    @classmethod
    def open(cls, path: Path) -> _Table:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise GpuError(
                f"plane table {path} cannot be opened: {exc.strerror}; did kv_decode die?"
            ) from exc
        if os.fstat(fd).st_size != _TABLE_BYTES:
            os.close(fd)
            raise GpuError(f"plane table {path} is not one")
        return cls(path, fd)

    @property
    def is_open(self) -> bool:
        return self.tickets is not None

    def clear(self, ticket: PlaneTicket) -> bool:
        """Free an entry; False where it holds another ticket by now."""
        if int(self.tickets[ticket.entry]) != ticket.ticket:
            return False
        self.tickets[ticket.entry] = 0
        return True

    def owner_lives(self) -> bool:
        """Whether the process that made the table still holds its lock."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        self.tickets = None
        with contextlib.suppress(BufferError):  # as `Arena.close`
            self._memory.close()
        os.close(self._fd)
