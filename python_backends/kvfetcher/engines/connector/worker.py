"""The connector's copies, on every rank: loads before the forward pass or beside it, saves afterwards.

What the engine calls returns at once: synchronous loads are enqueued on the engine's stream (on a CPU
they are done there and then), everything else runs on two threads of its own (`_Lane`), one for loads and
one for saves. A load that cannot be done after the engine was promised its tokens ends the process
(`fatal`): TensorRT-LLM has no way to take a load back, and wrong KV is worse than a restart.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfetcher.engines.connector.messages import Copied, Probed, Ready, Room, Saved
from kvfetcher.engines.connector.pool import probe_layout
from kvfetcher.engines.connector.scheduler import Metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.engines.connector.copies import BlockCopier, Done
    from kvfetcher.engines.connector.link import Sender
    from kvfetcher.engines.connector.messages import Message
    from kvfetcher.engines.connector.pool import Layout, PagedPool
    from kvfetcher.engines.connector.scheduler import Load

_log = logging.getLogger(__name__)

_MAX_DROPPED = 1024


def abort_process(reason: str) -> None:
    """End this process: the engine was promised KV that it will not get."""
    _log.critical("KV connector: %s; the engine's process ends rather than answer wrongly", reason)
    os.abort()


class _Lane:
    """A thread that runs jobs one after the other. Bounded by the engine's running requests."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"kvfetcher-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


@dataclass(slots=True)
class WorkerCounters:
    """Totals since the start."""

    loaded_blocks: int = 0
    saved_blocks: int = 0
    saves_failed: int = 0
    saves_timed_out: int = 0
    stale_metadata: int = 0
    """Iterations whose metadata had been executed already."""


@dataclass(slots=True)
class _Requests:
    """What is going on with which request of the engine. Under the worker's lock."""

    loading: set[int] = field(default_factory=set)
    """Copied beside the batch and not yet in place."""
    reported_loading: set[int] = field(default_factory=set)
    """The engine waits to hear that these are loaded."""
    saving: dict[int, float] = field(default_factory=dict)
    """The engine waits to hear that these are saved; the time after which no `Room` is awaited."""
    copying: set[int] = field(default_factory=set)
    """Their blocks are being read into the arena."""
    settled: set[int] = field(default_factory=set)
    """Nothing reads their blocks any more."""
    dropped: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_DROPPED))
    """Given up without a `Room`: their blocks are another's, one that comes late is refused."""


class ConnectorWorker:
    """See the module's text; the methods are those of TensorRT-LLM's worker class.

    Args:
        sender: the link to the owner.
        layout: layout of the pool; None = to be probed, until then nothing may be loaded or saved.
        save_timeout_seconds: how long a finished request's blocks wait for the owner's `Room`.
        clock: seconds, monotonic.
        fatal: called with a reason where the engine must not go on.
    """

    def __init__(
        self,
        sender: Sender,
        *,
        layout: Layout | None,
        save_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        fatal: Callable[[str], None] = abort_process,
    ) -> None:
        self._sender = sender
        self._layout = layout
        self._save_timeout_seconds = save_timeout_seconds
        self._clock = clock
        self.fatal = fatal
        self._pool: PagedPool | None = None
        self._copier: BlockCopier | None = None
        self._lock = threading.Lock()
        self._handed_over = threading.Condition(self._lock)
        self._requests = _Requests()
        self._executed = 0
        self._forward_done: Any = None
        self._is_marked = True
        self._loads = _Lane("loads")
        self._saves = _Lane("saves")
        self.counters = WorkerCounters()

    def register(self, pool: PagedPool, copier: BlockCopier, *, facts: str) -> None:
        """Take the pool into use and tell the owner."""
        self._pool, self._copier = pool, copier
        self._sender.send(Ready(num_pool_blocks=pool.num_blocks, facts=facts))

    def receive(self, message: Message) -> None:
        """A message of the owner, from the link's thread."""
        if isinstance(message, Room):
            self._take_room(message)

    def close(self) -> None:
        """End the threads and undo the page lock."""
        self._loads.close()
        self._saves.close()
        if self._copier is not None:
            self._copier.close()

    # What the engine calls

    def start_load_kv(self, metadata: object, stream: Any) -> None:
        """Run the loads of `metadata` unless they were run before (it stays bound when idle)."""
        if metadata is None:
            return  # some versions clear it where an iteration has none
        if not isinstance(metadata, Metadata):
            self.fatal("rank 0 could not say what to load; its log has the reason")
            return
        if metadata.sequence <= self._executed:
            self.counters.stale_metadata += 1
            return
        self._executed = metadata.sequence
        for load in metadata.loads:
            try:
                self._start(load, stream)
            except Exception as exc:  # noqa: BLE001  whatever it was, the tokens are promised
                _log.exception("load of request %d failed", load.request_id)
                self.fatal(f"a load of {len(load.arena_blocks)} blocks failed: {exc}")

    def wait_for_save(self, stream: Any) -> None:
        """Remember where the forward pass ends on its stream; saves start behind it."""
        if self._copier is None:
            return
        try:
            self._forward_done = self._copier.mark(stream)
            self._is_marked = True
        except Exception:  # noqa: BLE001  raised here it would fail every request of the batch
            # The next pass's mark is behind this pass too; until then nothing says when the blocks
            # are written.
            self._is_marked = False
            _log.exception("the end of a forward pass could not be marked; nothing is saved")

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Which of the requests handed in so far are saved, and which are loaded; each once."""
        try:
            return self._get_finished(finished_gen_req_ids, started_loading_req_ids)
        except Exception as exc:  # noqa: BLE001  it is not known any more who holds which blocks
            _log.exception("get_finished failed")
            self.fatal(f"what is loaded and saved is not known any more: {exc}")
            return [], []

    def _get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        with self._lock:
            requests, now = self._requests, self._clock()
            requests.reported_loading.update(started_loading_req_ids)
            for request_id in finished_gen_req_ids:
                requests.saving[request_id] = now + self._save_timeout_seconds
            self._handed_over.notify_all()
            loaded = sorted(requests.reported_loading - requests.loading)
            requests.reported_loading.difference_update(loaded)
            saved = sorted(
                i for i, until in requests.saving.items() if self._is_over(i, until, now)
            )
            for request_id in saved:
                del requests.saving[request_id]
                requests.settled.discard(request_id)
        return saved, loaded

    def _is_over(self, request_id: int, until: float, now: float) -> bool:
        requests = self._requests
        if request_id in requests.loading or request_id in requests.copying:
            return False  # a copy reads or writes its blocks
        if request_id in requests.settled:
            return True
        if now >= until:
            self.counters.saves_timed_out += 1
            requests.dropped.append(request_id)
            _log.warning("request %d is not saved: the arena's owner gave no room", request_id)
            return True
        return False

    # Loads

    def _start(self, load: Load, stream: Any) -> None:
        copier, layout = self._copier, self._layout
        if copier is None or layout is None:
            raise RuntimeError("the pool is not registered, or its layout is not known yet")
        if not load.is_async:
            done = copier.load(load.arena_blocks, load.pool_blocks, layout=layout, stream=stream)
            self._loads.put(functools.partial(self._finish_load, load, done))
            return
        with self._lock:
            self._requests.loading.add(load.request_id)
        # Behind what the engine has enqueued: passes that still read these blocks for another request.
        after = copier.mark(stream)
        self._loads.put(functools.partial(self._load_beside, load, layout, after))

    def _load_beside(self, load: Load, layout: Layout, after: Any) -> None:
        assert self._copier is not None
        try:
            stream = self._copier.side_stream("load", after)
            done = self._copier.load(
                load.arena_blocks, load.pool_blocks, layout=layout, stream=stream
            )
        except Exception as exc:  # noqa: BLE001  the engine waits for these blocks
            _log.exception("load of request %d failed", load.request_id)
            self.fatal(f"a load of {len(load.arena_blocks)} blocks failed: {exc}")
            return
        self._finish_load(load, done)

    def _finish_load(self, load: Load, done: Done) -> None:
        try:
            done.wait()
        except Exception as exc:  # noqa: BLE001  CUDA failed behind the call
            self.fatal(f"a load of {len(load.arena_blocks)} blocks failed: {exc}")
            return
        self.counters.loaded_blocks += len(load.arena_blocks)
        with self._lock:
            self._requests.loading.discard(load.request_id)
        self._sender.send(Copied(load.key))

    # Saves

    def _take_room(self, room: Room) -> None:
        with self._lock:
            is_late = room.request_id in self._requests.dropped
            has_work = bool(room.arena_blocks or room.probe)
            if has_work and not is_late:
                self._requests.copying.add(room.request_id)
            elif not is_late:
                self._requests.settled.add(room.request_id)
        if is_late and has_work:
            self._sender.send(Saved(room.key, ok=False, reason="the room came too late"))
        elif has_work:
            self._saves.put(functools.partial(self._save, room))

    def _save(self, room: Room) -> None:
        """Copy once the engine has said that the request is over; until then its pass may still run."""
        reason = ""
        try:
            if not self._await_finish(room.request_id):
                reason = "the engine did not hand the finished request over"
            elif not self._is_marked:
                reason = "it is not known when the forward pass ends"
            elif room.probe:
                self._probe(room)
            else:
                self._copy_out(room)
        except Exception as exc:  # noqa: BLE001  a save may always be dropped
            _log.exception("saving request %d failed", room.request_id)
            reason = f"{type(exc).__name__}: {exc}"
        with self._lock:
            self._requests.copying.discard(room.request_id)
            if room.request_id in self._requests.saving:
                self._requests.settled.add(room.request_id)
        if reason:
            self.counters.saves_failed += 1
        if not room.probe:
            self._sender.send(Saved(room.key, ok=not reason, reason=reason))

    def _await_finish(self, request_id: int) -> bool:
        """Wait until `get_finished` was handed the request; False when it never is."""
        with self._handed_over:
            return self._handed_over.wait_for(
                lambda: request_id in self._requests.saving, self._save_timeout_seconds
            )

    def _copy_out(self, room: Room) -> None:
        assert self._copier is not None
        if self._layout is None:
            raise RuntimeError("the pool's layout is not known yet")
        stream = self._copier.side_stream("save", self._forward_done)
        self._copier.save(
            room.pool_blocks, room.arena_blocks, layout=self._layout, stream=stream
        ).wait()
        self.counters.saved_blocks += len(room.arena_blocks)

    def _probe(self, room: Room) -> None:
        assert self._pool is not None
        assert self._copier is not None
        side = self._copier.side_stream("save", self._forward_done)
        if side is not None:
            side.synchronize()
        layout = probe_layout(
            self._pool.probe_values(room.pool_blocks),
            num_heads=self._pool.heads.count,
            head_dim=self._pool.spec.head_dim,
        )
        if self._layout is None:
            self._layout = layout
        elif self._pool.has_one_order:
            layout = None  # either is right: nothing speaks against the configured one
        self._sender.send(Probed(layout or ""))
