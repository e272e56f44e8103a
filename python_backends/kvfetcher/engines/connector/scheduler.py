"""The connector's decisions, on rank 0: which request is which, what to load, what to save.

TensorRT-LLM has two KV cache managers, and the connector hears which one when the pool is registered
(`begin`). The first (V1) allocates a whole prompt in the call that asks for an offer. The second (V2)
asks once, resolves the answer in that iteration or a later one, takes all, a part or none of it,
allocates by parts of the prompt, and may take a running request's blocks away and start it again.

Called from the engine's thread only, except `receive`, which the link's reader thread calls; the few
fields that both touch are under one lock that is held for microseconds. No method blocks on anything
else, none does I/O, and what a public method raises never reaches the engine (`_shielded`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kvfetcher.engines.connector.messages import (
    Announce,
    Announced,
    Finished,
    Matched,
    Withdraw,
    Withdrawn,
)
from kvfetcher.errors import EngineError
from kvfetcher.memory.leases import tokens_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvfetcher.engines.connector.link import Sender
    from kvfetcher.engines.connector.messages import Message

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MAX_ANNOUNCED = 4096
"""Announcements that no request has claimed; older ones are forgotten (a miss, not a fault)."""


@dataclass(frozen=True, slots=True)
class Load:
    """Copy arena blocks into pool blocks, one to one and in order."""

    request_id: int
    key: str
    arena_blocks: tuple[int, ...]
    pool_blocks: tuple[tuple[int, ...], ...]
    """Pool blocks by layer group, as many in each as there are arena blocks."""
    is_async: bool


@dataclass(frozen=True, slots=True)
class Metadata:
    """What rank 0 tells every rank in one iteration. Executed once: `sequence` says whether it was."""

    sequence: int
    loads: tuple[Load, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """In the place of `Metadata`: rank 0 cannot say what to load, and the engine counts on it."""


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    matched: int = 0
    unmatched: int = 0
    loads: int = 0
    loaded_tokens: int = 0
    cancelled_tokens: int = 0
    """Offered, and not taken by the engine after all."""
    restarts: int = 0
    """Requests whose blocks the engine took away, to run them again from the start."""
    faults: int = 0
    """Exceptions that were kept from the engine."""


@dataclass(slots=True)
class _Tracked:
    """A request of the engine that was announced."""

    announce: Announce
    load_tokens: int = 0
    first_token: int = 0
    is_async: bool = False
    load: Load | None = None
    """Allocated, not yet announced to the workers."""
    told: bool = False
    """The workers copy or have copied: from now on they say `Copied`."""
    parked: bool = False
    """An asynchronous load that the engine has not reported as over."""
    tokens_with_kv: int = 0


@dataclass(slots=True)
class Announcements:
    """Requests that are to come, by the number and the digest of their tokens. Thread-safe."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: OrderedDict[str, Announce] = field(default_factory=OrderedDict)
    _lengths: dict[int, int] = field(default_factory=dict)

    def add(self, announce: Announce) -> list[str]:
        """Keep one; the keys of those that had to go for it."""
        forgotten = []
        with self._lock:
            self._waiting[announce.key] = announce
            self._count(announce, 1)
            while len(self._waiting) > MAX_ANNOUNCED:
                _, oldest = self._waiting.popitem(last=False)
                self._count(oldest, -1)
                forgotten.append(oldest.key)
        return forgotten

    def remove(self, key: str) -> bool:
        """Forget one; False where a request has taken it."""
        with self._lock:
            announce = self._waiting.pop(key, None)
            if announce is not None:
                self._count(announce, -1)
            return announce is not None

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._waiting.clear()
            self._lengths.clear()

    def take(self, token_ids: Sequence[int], fits_salt: Callable[[str], bool]) -> Announce | None:
        """The announcement of a request with these tokens, which is its own from now on.

        Args:
            token_ids: the whole prompt.
            fits_salt: whether a cache salt may be the request's, as far as the engine tells.
        """
        with self._lock:
            if len(token_ids) not in self._lengths:
                return None  # nobody announced a prompt of this length: nothing is hashed
        digest = tokens_digest(token_ids)
        with self._lock:
            same = [
                a
                for a in self._waiting.values()
                if a.tokens_digest == digest and fits_salt(a.cache_salt)
            ]
            # Equal prompts of different tenants, and the engine does not say whose this one is:
            # what is saved would carry the wrong salt.
            if not same or len({a.cache_salt for a in same}) > 1:
                return None
            # Nor which of them this one is: where one must not be saved, none is.
            if not all(a.save for a in same):
                same = [replace(a, save=False) for a in same]
                self._waiting.update((a.key, a) for a in same)
            del self._waiting[same[0].key]
            self._count(same[0], -1)
            return same[0]

    def _count(self, announce: Announce, change: int) -> None:
        length = announce.num_prompt_tokens
        self._lengths[length] = self._lengths.get(length, 0) + change
        if not self._lengths[length]:
            del self._lengths[length]


def usable_tokens(lease_tokens: int, *, prompt_tokens: int, computed: int, block: int) -> int:
    """Tokens to offer beyond `computed`: whole blocks, and at least one prompt token is left over.

    0 where the engine's own prefix does not end with a block, since only whole blocks can be loaded.
    """
    if computed % block:
        return 0
    end = min(lease_tokens, prompt_tokens - 1) // block * block
    return max(0, end - computed)


def _shielded(default: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a method's exception from the engine: count it, log it, return `default`."""

    def wrap(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(*args, **kwargs)
            except Exception:  # noqa: BLE001  an engine of many requests must not end for one
                args[0].counters.faults += 1  # type: ignore[attr-defined]
                _log.exception("connector: %s failed", method.__name__)
                return default

        return call

    return wrap


class ConnectorScheduler:
    """See the module's text; the methods are those of TensorRT-LLM's scheduler class.

    Args:
        sender: the link to the owner.
        tokens_per_block: tokens per block of engine and arena.
        async_load_tokens: smallest load, in tokens, that is asynchronous; 0 = none is.
    """

    def __init__(self, sender: Sender, *, tokens_per_block: int, async_load_tokens: int) -> None:
        self._sender = sender
        self._block = tokens_per_block
        self._async_load_tokens = async_load_tokens
        self._announced = Announcements()
        self._tracked: dict[int, _Tracked] = {}
        # Without blocks at the moment, by key; the link's thread ends those that nobody waits for.
        self._resting: dict[str, tuple[int, _Tracked]] = {}
        self._unwanted: set[str] = set()
        self._resting_lock = threading.Lock()
        self._is_v2 = False
        self._tells_cancelled = False
        self._has_fault = False
        self._sequence = 0
        self.counters = SchedulerCounters()

    def begin(self, *, is_v2: bool, tells_cancelled: bool) -> None:
        """The pool is registered.

        Args:
            is_v2: by the second cache manager.
            tells_cancelled: the engine calls `cancel_load` for what it does not take of an offer.
        """
        self._is_v2, self._tells_cancelled = is_v2, tells_cancelled

    def receive(self, message: Message) -> None:
        """A message of the owner, from the link's thread."""
        if isinstance(message, Announce):
            for key in self._announced.add(message):
                self._sender.send(Withdrawn(key, used=False))
            self._sender.send(Announced(message.key))
        elif isinstance(message, Withdraw):
            # Atomic with `take`: a request either has the announcement or will not get it.
            is_used = not self._announced.remove(message.key)
            self._sender.send(Withdrawn(message.key, used=is_used))
            if is_used:
                self._end_if_resting(message.key)

    @_shielded((0, False))
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        tracked = self._find(request.request_id)
        if not self._sender.is_open:
            # Whoever fills the arena has lost sight of this rank, and may fill the blocks that were
            # announced with something else as soon as all ranks are taken for gone.
            self._announced.clear()
            if tracked is not None:
                tracked.load, tracked.load_tokens, tracked.tokens_with_kv = None, 0, 0
            return 0, False
        token_ids = request.get_tokens(0)
        if tracked is None:
            announce = self._announced.take(token_ids, _salt_filter(request))
            if announce is None:
                self.counters.unmatched += 1
                return 0, False
            self.counters.matched += 1
            tracked = self._tracked[request.request_id] = _Tracked(announce)
        else:  # allocated again
            tracked.tokens_with_kv = 0
            if tracked.told or not tracked.load_tokens:
                # Its lease was read or declined: the arena's blocks may be another's by now.
                tracked.load, tracked.load_tokens = None, 0
                return 0, False
        return self._offer(tracked, len(token_ids), num_computed_tokens)

    def _offer(self, tracked: _Tracked, prompt_tokens: int, computed: int) -> tuple[int, bool]:
        announce = tracked.announce
        number = usable_tokens(
            announce.lease_tokens, prompt_tokens=prompt_tokens, computed=computed, block=self._block
        )
        tracked.load = None
        tracked.first_token, tracked.load_tokens = computed, number
        tracked.is_async = bool(number and 0 < self._async_load_tokens <= number)
        reason = ""
        if announce.lease_tokens and not number:
            reason = f"the engine holds {computed} tokens of this prompt itself"
        self._sender.send(Matched(announce.key, computed, number, reason))
        return number, tracked.is_async

    def update_state_after_alloc(self, request: Any, block_ids: Sequence[int]) -> None:
        """Do as `update_state_after_alloc_by_layer_group`, for one layer group."""
        self.update_state_after_alloc_by_layer_group(request, (block_ids,))

    @_shielded(None)
    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids: Sequence[Sequence[int]]
    ) -> None:
        """Blocks of the request by layer group; on V2 those of the first part of the prompt."""
        tracked = self._find(request.request_id)
        if tracked is None or not tracked.load_tokens or tracked.told:
            return
        try:
            self._plan_load(request.request_id, tracked, block_ids)
        except Exception:
            # The engine counts on these tokens: the next metadata says that they will not come.
            self._has_fault = True
            raise

    def _plan_load(
        self, request_id: int, tracked: _Tracked, block_ids: Sequence[Sequence[int]]
    ) -> None:
        first = tracked.first_token // self._block
        end = first + tracked.load_tokens // self._block
        if self._is_v2:
            # What has no blocks was not taken: it is computed, whatever was offered.
            end = max(first, min(end, *(len(group) for group in block_ids)))
        groups = tuple(tuple(group[first:end]) for group in block_ids)
        if any(len(group) != end - first or min(group, default=0) < 0 for group in groups):
            raise EngineError(
                f"request {request_id} was offered {tracked.load_tokens} tokens and got the blocks"
                f" {groups}"
            )
        if end == first:
            self._give_up_offer(tracked, "the engine has no room for it")
            return
        tracked.load_tokens = (end - first) * self._block
        tracked.load = Load(
            request_id=request_id,
            key=tracked.announce.key,
            arena_blocks=tracked.announce.lease_blocks[first:end],
            pool_blocks=groups,
            is_async=tracked.is_async,
        )

    @_shielded(None)
    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """The engine will not use what it was offered of positions [start, end) of the prompt (V2)."""
        tracked = self._find(request.request_id)
        if tracked is None or tracked.told or not tracked.load_tokens:
            return  # under way or over: what it wrote is computed over
        first, stop = tracked.first_token, tracked.first_token + tracked.load_tokens
        if start <= first:
            kept_first, kept_stop = -(-max(first, end) // self._block) * self._block, stop
        else:
            kept_first, kept_stop = first, min(stop, start // self._block * self._block)
        self.counters.cancelled_tokens += tracked.load_tokens - max(0, kept_stop - kept_first)
        if kept_first >= kept_stop:
            self._give_up_offer(tracked, "the engine did not take it")
            if not tracked.tokens_with_kv:  # it may never be scheduled
                self._rest(request.request_id)
            return
        load = tracked.load
        if load is not None:
            keep = slice((kept_first - first) // self._block, (kept_stop - first) // self._block)
            tracked.load = replace(
                load,
                arena_blocks=load.arena_blocks[keep],
                pool_blocks=tuple(group[keep] for group in load.pool_blocks),
            )
        tracked.first_token, tracked.load_tokens = kept_first, kept_stop - kept_first

    @_shielded(None)
    def request_reset(self, request: Any) -> None:
        """The request lost its blocks and will run again from the start (V2)."""
        if self._find(request.request_id) is not None:
            self._restart(request.request_id)

    def _restart(self, request_id: int) -> None:
        tracked = self._tracked[request_id]
        self.counters.restarts += 1
        # An offer that was not told to the workers stands: it is asked for again.
        tracked.load, tracked.tokens_with_kv, tracked.parked = None, 0, False
        self._rest(request_id)

    def _give_up_offer(self, tracked: _Tracked, reason: str) -> None:
        tracked.load, tracked.load_tokens = None, 0
        self._sender.send(Matched(tracked.announce.key, tracked.first_token, 0, reason))

    # Requests without blocks: they may come again, or never

    def _find(self, request_id: int) -> _Tracked | None:
        """A request that was announced; from now on it has blocks, as far as is known."""
        tracked = self._tracked.get(request_id)
        if tracked is None and self._resting:
            with self._resting_lock:
                for key, (resting_id, resting) in self._resting.items():
                    if resting_id == request_id:
                        del self._resting[key]
                        tracked = self._tracked[request_id] = resting
                        break
        return tracked

    def _rest(self, request_id: int) -> None:
        tracked = self._tracked.pop(request_id)
        with self._resting_lock:
            self._resting[tracked.announce.key] = request_id, tracked
            is_unwanted = tracked.announce.key in self._unwanted
        if is_unwanted:
            self._end_if_resting(tracked.announce.key)

    def _end_if_resting(self, key: str) -> None:
        """Nobody waits for the request any more: say its end if it has no blocks. Any thread."""
        with self._resting_lock:
            self._unwanted.add(key)
            found = self._resting.pop(key, None)
            if found is None:
                return
            self._unwanted.discard(key)
        request_id, tracked = found
        if tracked.load_tokens and not tracked.told:
            self._sender.send(Matched(key, tracked.first_token, 0, "the request ended"))
        self._sender.send(Finished(key, request_id, False, 0, (), ()))

    @_shielded(Failed())
    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        if self._has_fault:
            raise EngineError("blocks of an offer could not be read")
        try:
            scheduled = self._note_progress(scheduler_output)
        except Exception:  # noqa: BLE001  what is loaded does not depend on it, and less is saved
            self.counters.faults += 1
            scheduled = set(self._tracked)
            _log.exception("connector: the batch could not be read")
        loads = []
        for request_id, tracked in self._tracked.items():
            is_waiting = tracked.load_tokens and not tracked.told and tracked.load is None
            if is_waiting and (not self._is_v2 or request_id in scheduled):
                # The engine counts on these tokens. Raised here it becomes a `Failed` that every
                # worker takes for what it is: the end, and not a wrong answer.
                raise EngineError(f"request {request_id} was offered tokens and got no blocks")
            if tracked.load is not None:
                loads.append(tracked.load)
                tracked.told, tracked.parked = True, tracked.is_async
                self.counters.loads += 1
                self.counters.loaded_tokens += tracked.load_tokens
                tracked.load = None
        self._sequence += 1
        return Metadata(self._sequence, tuple(loads))

    def _note_progress(self, scheduler_output: Any) -> set[int]:
        """Learn how many tokens of each request will have KV after this iteration; ids of the batch."""
        scheduled = set()
        for is_new, requests in (
            (True, scheduler_output.new_requests),
            (False, scheduler_output.cached_requests),
        ):
            for data in requests:
                scheduled.add(data.request_id)
                tracked = self._find(data.request_id)
                if tracked is None:
                    continue
                tracked.parked = False
                end = data.computed_position + data.num_scheduled_tokens
                # The first report leaves a synchronous load out. Where it is not told how much of an
                # offer was taken, the next report will say how far the request is: less is saved.
                if is_new and not tracked.is_async and (not self._is_v2 or self._tells_cancelled):
                    end += tracked.load_tokens
                tracked.tokens_with_kv = max(tracked.tokens_with_kv, end)
        return scheduled

    def request_finished(self, request: Any, cache_block_ids: Sequence[int]) -> bool:
        """Do as `request_finished_by_layer_group`, for one layer group."""
        return self.request_finished_by_layer_group(request, (cache_block_ids,))

    # True = the workers hold the blocks until they know better: right even after a fault here.
    @_shielded(True)
    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids: Sequence[Sequence[int]]
    ) -> bool:
        """The request ended, or (V2) its blocks are taken away and it will run again."""
        tracked = self._find(request.request_id)
        if tracked is None:
            return False
        if self._is_v2 and getattr(request, "is_finished", True) is False:
            # Preempted, or cancelled (not before its load is over). Whether its blocks would be held
            # for a save is not documented, so nothing is saved.
            self._restart(request.request_id)
            return False
        del self._tracked[request.request_id]
        announce = tracked.announce
        with self._resting_lock:
            self._unwanted.discard(announce.key)
        if tracked.load_tokens and not tracked.told:
            # Ended between allocation and the batch: the workers never heard of the load.
            self._sender.send(Matched(announce.key, tracked.first_token, 0, "the request ended"))
        try:
            finished = self._finished(request, tracked, cache_block_ids)
        except Exception:  # noqa: BLE001  the owner must hear the end, or it keeps the request
            self.counters.faults += 1
            _log.exception("connector: request %d is not saved", request.request_id)
            finished = Finished(announce.key, request.request_id, True, 0, (), ())
        self._sender.send(finished)
        return finished.is_pinned

    def _finished(
        self, request: Any, tracked: _Tracked, cache_block_ids: Sequence[Sequence[int]]
    ) -> Finished:
        announce, token_ids = tracked.announce, request.get_tokens(0)
        # The newest token has no KV: it was chosen by the last pass and is the input of the next.
        held = min(tracked.tokens_with_kv, len(token_ids) - 1)
        for group in cache_block_ids:
            held = min(held, _blocks_there(group) * self._block)
        if tracked.parked or not (announce.save or announce.probe):
            held = 0
        return Finished(
            key=announce.key,
            request_id=request.request_id,
            is_pinned=bool(held or tracked.parked),
            tokens_with_kv=held,
            token_ids=tuple(token_ids[announce.num_prompt_tokens : held]),
            pool_blocks=tuple(tuple(group) for group in cache_block_ids),
        )


def _blocks_there(ids: Sequence[int]) -> int:
    """Number of blocks before the first that has no memory (id -1, `BAD_PAGE_INDEX`)."""
    return next((index for index, block in enumerate(ids) if block < 0), len(ids))


def _salt_filter(request: Any) -> Callable[[str], bool]:
    """Which cache salts may be the request's: some versions tell it, some a number for it, some nothing."""
    salt = getattr(request, "cache_salt", None)
    if isinstance(salt, str):
        return lambda announced: announced == salt
    number = getattr(request, "cache_salt_id", None)
    if salt is not None or number is not None:  # it has one, and not which
        return bool
    if hasattr(request, "cache_salt") or hasattr(request, "cache_salt_id"):
        return lambda announced: not announced
    return lambda _: True
