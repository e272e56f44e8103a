"""The owner's end of the connector: announces requests to the engine's ranks, keeps their leases, makes room.

One thread accepts, two per rank read and write. A lease that was announced stays claimed until every
rank has said that it reads it no more, or the engine will not run the request, or the processes of all
ranks are gone: a rank whose connection ended may still run what it was told of.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import queue
import secrets
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfetcher.engines.connector.messages import (
    MAX_LINE_BYTES,
    SOCKET_NAME,
    Announce,
    Announced,
    Copied,
    Finished,
    Hello,
    Matched,
    Probed,
    Ready,
    Refused,
    Room,
    Saved,
    Welcome,
    Withdraw,
    Withdrawn,
    from_line,
    to_line,
)
from kvfetcher.errors import ArenaError, ArenaFullError, EngineError, LeaseError, RequestError
from kvfetcher.memory.leases import SaveTicket, chunks_to_save, tokens_digest
from kvfetcher.spec import heads_of_rank

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfetcher.config import Config
    from kvfetcher.engines.connector.messages import Message
    from kvfetcher.memory.arena import Arena, BlockTarget
    from kvfetcher.memory.leases import Lease, LeaseTable
    from kvfetcher.spec import KVSpec

_log = logging.getLogger(__name__)

# A rank's reader only files messages away, but another thread of its process may hold the
# interpreter meanwhile (compiling, capturing graphs).
_SEND_SECONDS = 30
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Facts that the ranks get, and limits of the owner."""

    spec: KVSpec
    """Geometry of the whole model."""
    tokens_per_block: int
    chunk_tokens: int
    layout: str
    """"HND", "NHD", or "" = probed."""
    async_load_tokens: int
    save_timeout_seconds: float
    save_generated: bool
    lease_ttl_seconds: float
    """Time to live of the blocks that are leased for saving."""


@dataclass(slots=True)
class HubCounters:
    """Totals since the start."""

    announced: int = 0
    matched: int = 0
    withdrawn_unused: int = 0
    loaded_tokens: int = 0
    tickets: int = 0
    saves_dropped: int = 0


@dataclass(slots=True)
class Handle:
    """One announced request. Futures are concurrent ones; they always end."""

    announce: Announce
    prompt: tuple[int, ...]
    lease: Lease | None
    """Claimed; None once let go."""
    is_announced: concurrent.futures.Future[bool] = field(default_factory=concurrent.futures.Future)
    """False where the engine's ranks are gone."""
    ticket: concurrent.futures.Future[SaveTicket | None] = field(
        default_factory=concurrent.futures.Future
    )
    """What was saved into the arena; None = nothing."""
    is_matched: concurrent.futures.Future[bool] = field(default_factory=concurrent.futures.Future)
    """False where the engine does not run it."""
    matched: Matched | None = None
    wants_save: bool = False
    """May be cleared until the request ends."""
    _copied: set[int] = field(default_factory=set)
    _room: Lease | None = None
    _chunks: range = range(0)
    _token_ids: tuple[int, ...] = ()
    _saved: dict[int, bool] = field(default_factory=dict)


class _Peer:
    """One rank's connection and process. Sending is handing over: no caller waits for the socket."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="kvfetcher-hub-out", daemon=True)
        self._process = _watch(pid)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Lost when the rank is gone."""
        self._outbox.put(message)

    def shut(self) -> None:
        """End the connection, so that the rank knows. Safe to call twice."""
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def is_gone(self) -> bool:
        """Whether the rank's process has ended; False where that cannot be known."""
        return self._process is not None and bool(select.select([self._process], [], [], 0)[0])

    def close(self) -> None:
        """After `shut`: wait for the thread."""
        self._thread.join(timeout=5.0)
        if self._process is not None:
            os.close(self._process)
            self._process = None

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.sendall(to_line(message))
        except OSError as exc:
            _log.warning("a rank of the engine cannot be notified: %s", exc)
            self.shut()


def _watch(pid: int) -> int | None:
    """A descriptor that is readable once the process has ended; unlike its number it is never reused."""
    try:
        return os.pidfd_open(pid)
    except OSError as exc:
        _log.warning("process %d of the engine cannot be watched: %s", pid, exc.strerror)
        return None


class ConnectorHub:
    """See the module's text. A context manager; all methods are thread-safe.

    Args:
        path: path of the socket; an old file there is replaced.
        num_ranks: number of ranks of the engine.
        arena: arena of the whole model, with a part for the heads of every rank.
        leases: the table over its blocks.
        settings: see `HubSettings`.
        clock: seconds, monotonic; the one that leases are claimed with.

    Raises:
        EngineError: the socket cannot be bound.
        ArenaError: the arena has no part for a rank.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_ranks: int,
        arena: Arena,
        leases: LeaseTable,
        settings: HubSettings,
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self._num_ranks = num_ranks
        self._paths = [_path_for(rank, num_ranks, arena) for rank in range(num_ranks)]
        self._arena = arena
        self._leases = leases
        self._settings = settings
        self._clock = clock
        self._changed = threading.Condition()
        self._ranks: dict[int, _Peer] = {}
        self._ready: dict[int, str] = {}
        self._layouts: dict[int, str] = {}
        self._handles: dict[str, Handle] = {}
        self._held: list[Lease] = []
        self._dead = ""
        self._closing = self._is_ending = False
        self._on_lost: Callable[[str], None] | None = None
        self.counters = HubCounters()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(os.fspath(path))
            path.chmod(0o600)
            self._listener.listen(num_ranks)
        except OSError as exc:
            self._listener.close()
            raise EngineError(f"connector socket {path} cannot be bound: {exc.strerror}") from exc
        self._threads = [threading.Thread(target=self._accept, name="kvfetcher-hub", daemon=True)]
        self._threads[0].start()

    def expect_end(self) -> None:
        """Take ranks that go for no fault from now on: the engine is being closed."""
        with self._changed:
            self._is_ending = True

    def close(self) -> None:
        """End every connection and let every lease go. Safe to call twice."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._changed:
            peers = tuple(self._ranks.values())
        for peer in peers:
            peer.shut()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)
        self._listener.close()
        self._fail("the engine was closed")
        for peer in peers:
            peer.close()
        self._release_held()
        self.path.unlink(missing_ok=True)

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Call `call` with the reason, from a thread, when ranks go and no end is expected.

        Raises:
            EngineError: they have gone already.
        """
        with self._changed:
            if self._dead:
                raise EngineError(self._dead)
            self._on_lost = call

    @property
    def dead(self) -> str:
        """Why the engine's ranks are gone; "" while they are there."""
        with self._changed:
            return self._dead

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layout of the pools by rank; "" if it is not known."""
        with self._changed:
            known = self._settings.layout
            return tuple(self._layouts.get(rank) or known for rank in range(self._num_ranks))

    @property
    def is_layout_proven(self) -> bool:
        """Whether every rank's probe found the layout, configured or not."""
        with self._changed:
            return len(self._layouts) == self._num_ranks and all(self._layouts.values())

    @property
    def facts(self) -> tuple[str, ...]:
        """What the ranks said of themselves, for people."""
        with self._changed:
            return tuple(self._ready[rank] for rank in sorted(self._ready))

    @property
    def num_open(self) -> int:
        """Requests whose lease or saving is not over."""
        with self._changed:
            return len(self._handles)

    def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every rank has registered its pool.

        Raises:
            EngineError: a rank is missing, or gone.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._dead or len(self._ready) == self._num_ranks, timeout_seconds
            )
            if self._dead or len(self._ready) < self._num_ranks:
                raise EngineError(
                    self._dead
                    or f"{len(self._ready)} of {self._num_ranks} engine ranks have registered"
                    f" their KV pool after {timeout_seconds:g} s; is the KV connector configured"
                    " (kv_connector_config), and does the engine's log say why it failed?"
                )

    def wait_layout(self, timeout_seconds: float) -> None:
        """Wait until every rank has probed its pool.

        A configured layout is probed too, since an upgrade of the engine may change it.

        Raises:
            EngineError: a probe proved nothing, proved another layout than the configured one, or
                did not end.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._dead or len(self._layouts) == self._num_ranks, timeout_seconds
            )
            known = [self._layouts.get(rank, "") for rank in range(self._num_ranks)]
            configured = self._settings.layout
            if configured and any(found not in ("", configured) for found in known):
                raise EngineError(
                    f"connector.kv_layout = {configured!r}, but the engine's KV blocks are laid out as"
                    f" {known} (by rank); set it to auto"
                )
            if not all(known) and not configured:
                raise EngineError(
                    "the layout of the engine's KV blocks could not be established (by rank:"
                    f" {known}); set connector.kv_layout to HND or NHD, whichever the attention backend"
                    " uses (TensorRT-LLM's own: HND), and run `kvfetcher doctor --engine"
                    " tensorrt_llm`"
                )

    def announce(
        self,
        prompt: tuple[int, ...],
        *,
        cache_salt: str,
        lease: Lease | None,
        save: bool,
        probe: bool = False,
    ) -> Handle:
        """Tell rank 0 of a request before the engine gets it.

        Args:
            prompt: all token ids.
            cache_salt: salt of the request.
            lease: claimed; the handle owns it from now on.
            save: whether to save what the request computes.
            probe: the request serves to find the pool's layout.

        Returns:
            A handle; `settle` must be called with it. Wait for `is_announced` before the engine is
            given the request.
        """
        announce = Announce(
            key=secrets.token_hex(8),
            tokens_digest=tokens_digest(prompt),
            num_prompt_tokens=len(prompt),
            cache_salt=cache_salt,
            lease_tokens=lease.num_tokens if lease else 0,
            lease_blocks=lease.block_ids if lease else (),
            save=save,
            probe=probe,
        )
        handle = Handle(announce, prompt, lease, wants_save=save or probe)
        with self._changed:
            usable = not self._dead and len(self._ready) == self._num_ranks
            if not (usable and (probe or self._has_layout())):
                self._end(handle)
                return handle
            self._handles[announce.key] = handle
            self.counters.announced += 1
            # Under the lock: a request that `_fail` has ended is never announced after that.
            self._ranks[0].send(announce)
        return handle

    def settle(self, handle: Handle, *, save: bool) -> None:
        """The request's answer is over; its lease goes as soon as nobody reads it.

        Args:
            handle: handle of `announce`.
            save: False = nothing is to be saved any more.
        """
        with self._changed:
            handle.wants_save &= save
            if handle.announce.key in self._handles:
                self._ranks[0].send(Withdraw(handle.announce.key))

    # Connections

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with self._changed:
                closing = self._closing
            if closing:
                connection.close()
                return
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_SECONDS, 0)
            )
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="kvfetcher-hub-rank", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        rank = -1
        try:
            with connection, connection.makefile("rb") as lines:
                rank = self._greet(connection, from_line(lines.readline(MAX_LINE_BYTES)))
                while rank >= 0 and (line := lines.readline(MAX_LINE_BYTES)):
                    self._receive(rank, from_line(line))
        except (OSError, ValueError) as exc:
            _log.info("rank %d: %s", rank, exc)
        except RequestError:
            _log.exception("rank %d speaks another version", rank)
        except Exception:  # noqa: BLE001  nobody would hear this rank any more
            _log.exception("a message of rank %d could not be taken in", rank)
        if rank >= 0:
            self._fail(f"rank {rank} of the engine is gone; restart the server")

    def _greet(self, connection: socket.socket, hello: Message) -> int:
        """Answer Hello; the rank, or -1 where it is refused."""
        reason = ""
        with self._changed:
            if not isinstance(hello, Hello):
                reason = "the first line must be hello"
            elif hello.num_ranks != self._num_ranks:
                reason = (
                    f"the engine has {hello.num_ranks} ranks, {self._num_ranks} were expected"
                    " (tensor_parallel_size in engine.llm_args)"
                )
            elif hello.rank in self._ranks or not 0 <= hello.rank < self._num_ranks:
                reason = f"rank {hello.rank} is connected already, or not one of this engine"
            else:
                peer = self._ranks[hello.rank] = _Peer(connection, hello.pid)
                peer.send(self._welcome(hello.rank))
        if reason or not isinstance(hello, Hello):
            connection.sendall(to_line(Refused(reason)))
            return -1
        return hello.rank

    def _welcome(self, rank: int) -> Welcome:
        settings = self._settings
        return Welcome(
            arena=self._paths[rank],
            generation=self._arena.generation,
            spec=settings.spec.to_dict(),
            tokens_per_block=settings.tokens_per_block,
            layout=settings.layout,
            async_load_tokens=settings.async_load_tokens,
            save_timeout_seconds=settings.save_timeout_seconds,
        )

    # Messages

    def _receive(self, rank: int, message: Message) -> None:
        room: Room | None = None
        with self._changed:
            if isinstance(message, Ready):
                self._ready[rank] = message.facts
            elif isinstance(message, Probed):
                self._layouts[rank] = message.layout
            elif isinstance(
                message, Announced | Withdrawn | Matched | Copied | Finished | Saved
            ) and (handle := self._handles.get(message.key)):
                room = self._advance(handle, rank, message)
            if room is not None:
                for peer in self._ranks.values():
                    peer.send(room)
            self._changed.notify_all()

    def _advance(
        self,
        handle: Handle,
        rank: int,
        message: Announced | Withdrawn | Matched | Copied | Finished | Saved,
    ) -> Room | None:
        """Take in what a rank said of one request; a `Room` to be sent to all ranks."""
        room = None
        if isinstance(message, Announced):
            handle.is_announced.set_result(True)
        elif isinstance(message, Withdrawn):
            if not message.used:
                self.counters.withdrawn_unused += 1
                self._end(handle)
        elif isinstance(message, Matched):
            handle.matched = message
            if not handle.is_matched.done():  # asked again after a replay
                handle.is_matched.set_result(True)
            self.counters.matched += 1
            self.counters.loaded_tokens += message.num_loaded_tokens
            if not message.num_loaded_tokens:
                self._let_go(handle)
        elif isinstance(message, Copied):
            handle._copied.add(rank)
            if len(handle._copied) == self._num_ranks:
                self._let_go(handle)
        elif isinstance(message, Finished):
            room = self._make_room(handle, message)
        else:
            handle._saved[rank] = message.ok
            if len(handle._saved) == self._num_ranks:
                self._seal(handle)
        self._forget_if_over(handle)
        return room

    def _make_room(self, handle: Handle, finished: Finished) -> Room | None:
        settings, announce = self._settings, handle.announce
        held = finished.tokens_with_kv if handle.wants_save else 0
        if not settings.save_generated:
            held = min(held, announce.num_prompt_tokens)
        room = Room(
            key=announce.key,
            request_id=finished.request_id,
            pool_blocks=(),
            arena_blocks=(),
        )
        if announce.probe:
            handle.ticket.set_result(None)
            return Room(
                key=announce.key,
                request_id=finished.request_id,
                pool_blocks=tuple(group[:1] for group in finished.pool_blocks),
                arena_blocks=(),
                probe=True,
            )
        chunks = chunks_to_save(
            cached_tokens=announce.lease_tokens,
            tokens_with_kv=held,
            chunk_tokens=settings.chunk_tokens,
        )
        if chunks and finished.is_pinned:
            try:
                handle._room = self._leases.lease(
                    len(chunks) * settings.chunk_tokens,
                    settings.lease_ttl_seconds,
                    now=self._clock(),
                )
            except ArenaFullError as exc:
                self.counters.saves_dropped += 1
                _log.info("a request is not saved: %s", exc)
        if handle._room is None:
            handle.ticket.set_result(None)
            return room if finished.is_pinned else None
        handle._chunks = chunks
        end = chunks.stop * settings.chunk_tokens
        handle._token_ids = (handle.prompt + finished.token_ids)[:end]
        first_block = chunks.start * settings.chunk_tokens // settings.tokens_per_block
        return Room(
            key=announce.key,
            request_id=finished.request_id,
            pool_blocks=tuple(
                group[first_block : end // settings.tokens_per_block]
                for group in finished.pool_blocks
            ),
            arena_blocks=handle._room.block_ids,
        )

    def _seal(self, handle: Handle) -> None:
        """Every rank has answered: make the ticket, or give the room back."""
        room, handle._room = handle._room, None
        assert room is not None  # Saved answers a Room with blocks
        ticket = None
        try:
            if all(handle._saved.values()):
                first = handle._chunks.start * self._settings.chunk_tokens
                digest = tokens_digest(handle._token_ids[first:])
                self._leases.seal(room.id, room.num_tokens, digest, now=self._clock())
                ticket = SaveTicket(
                    lease_id=room.id,
                    targets=self._targets(room, len(handle._chunks)),
                    first_chunk_index=handle._chunks.start,
                    token_ids=handle._token_ids,
                    cache_salt=handle.announce.cache_salt,
                )
                self.counters.tickets += 1
            else:
                self.counters.saves_dropped += 1
                self._leases.release(room.id, now=self._clock())
        except LeaseError as exc:  # the ranks took longer than the room lived
            self.counters.saves_dropped += 1
            _log.warning("a request is not saved: %s", exc)
        handle.ticket.set_result(ticket)

    def _targets(self, room: Lease, num_chunks: int) -> tuple[BlockTarget, ...]:
        settings = self._settings
        whole = self._arena.target(room.block_ids, room.num_tokens)
        return tuple(
            whole.span(
                index * settings.chunk_tokens,
                settings.chunk_tokens,
                tokens_per_block=settings.tokens_per_block,
            )
            for index in range(num_chunks)
        )

    # Ends

    def _has_layout(self) -> bool:
        return bool(self._settings.layout) or (
            len(self._layouts) == self._num_ranks and all(self._layouts.values())
        )

    def _let_go(self, handle: Handle) -> None:
        lease, handle.lease = handle.lease, None
        if lease is not None:
            self._leases.release(lease.id, now=self._clock(), is_claimer=True)

    def _end(self, handle: Handle) -> None:
        """Nothing more comes of this request: the engine does not run it, or is gone."""
        self._let_go(handle)
        room, handle._room = handle._room, None
        if room is not None:
            with contextlib.suppress(LeaseError):  # expired meanwhile
                self._leases.abandon(room.id, now=self._clock())
        for future in (handle.is_announced, handle.is_matched):
            if not future.done():
                future.set_result(False)
        if not handle.ticket.done():
            handle.ticket.set_result(None)
        self._handles.pop(handle.announce.key, None)

    def _forget_if_over(self, handle: Handle) -> None:
        if handle.lease is None and handle.ticket.done():
            self._handles.pop(handle.announce.key, None)

    def _fail(self, reason: str) -> None:
        """End every request. Their leases stay claimed: ranks that live may still read them."""
        with self._changed:
            is_first, self._dead = not self._dead, self._dead or reason
            is_fault = is_first and not (self._closing or self._is_ending)
            for handle in tuple(self._handles.values()):
                if handle.lease is not None:
                    self._held.append(handle.lease)
                    handle.lease = None
                self._end(handle)
            for peer in self._ranks.values():
                peer.shut()  # the others may not know yet
            if is_first and not self._closing:
                watch = threading.Thread(
                    target=self._await_end, name="kvfetcher-hub-end", daemon=True
                )
                self._threads.append(watch)
                watch.start()
            on_lost = self._on_lost if is_fault else None
            self._changed.notify_all()
        if is_fault:
            _log.error("%s", reason)
        if on_lost is not None:
            on_lost(reason)

    def _await_end(self) -> None:
        """Let the held leases go once no rank's process is left."""
        with self._changed:
            while not (self._closing or all(peer.is_gone() for peer in self._ranks.values())):
                self._changed.wait(_LOOK_SECONDS)
            if not self._closing:  # else `close` does, in its order
                self._release_held()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for lease in held:
            self._leases.release(lease.id, now=self._clock(), is_claimer=True)


def _path_for(rank: int, num_ranks: int, arena: Arena) -> str:
    """Path of the part of `arena` that holds a rank's heads."""
    heads = heads_of_rank(arena.spec.num_kv_heads, rank=rank, num_ranks=num_ranks)
    for part in arena.parts:
        if part.heads == heads:
            return str(part.path)
    raise ArenaError(f"arena {arena.path} has no part with the heads of rank {rank}, {heads}")


def hub_settings(config: Config, spec: KVSpec) -> HubSettings:
    """What the connector's ranks and the hub need of the configuration."""
    return HubSettings(
        spec=spec,
        tokens_per_block=config.engine.tokens_per_block,
        chunk_tokens=config.codec.chunk_tokens,
        layout="" if config.connector.kv_layout == "auto" else config.connector.kv_layout,
        async_load_tokens=config.connector.async_load_tokens,
        save_timeout_seconds=config.connector.save_timeout_seconds,
        save_generated=config.save.generated,
        # A rank may begin to write to its room after the save timeout; until then it is nobody else's.
        lease_ttl_seconds=max(
            config.fetch.lease_ttl_seconds, 2 * config.connector.save_timeout_seconds
        ),
    )


def open_hub(
    config: Config,
    spec: KVSpec,
    *,
    folder: Path,
    arena: Arena,
    num_ranks: int,
    leases: LeaseTable,
    clock: Callable[[], float],
) -> ConnectorHub:
    """The connector's other end, in the run folder.

    Raises:
        EngineError, ArenaError: as `ConnectorHub`.
    """
    return ConnectorHub(
        folder / SOCKET_NAME,
        num_ranks=num_ranks,
        arena=arena,
        leases=leases,
        settings=hub_settings(config, spec),
        clock=clock,
    )
