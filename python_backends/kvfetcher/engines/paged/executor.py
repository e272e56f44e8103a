"""The engine's loop over paged KV, in TensorRT-LLM's documented order, on every rank.

One `step`:

    take new and cancelled requests (rank 0's, broadcast)
    schedule a batch
    for each request's first part: allocate -> GET_NUM_NEW_MATCHED_TOKENS -> UPDATE_STATE_AFTER_ALLOC
    with a batch: BUILD_CONNECTOR_META on rank 0 -> broadcast -> bind -> START_LOAD_KV
    without those that load asynchronously (they are parked): forward, hooks around each layer,
        WAIT_FOR_SAVE, sample, answers, REQUEST_FINISHED for what ended
    GET_FINISHED, always; acted on when every rank has said so

Requests run one by one within a batch: their numbers do not depend on their neighbours. A prompt runs in
parts that begin and end at absolute multiples of `part_tokens`. Where a loaded prefix ends inside a part
(the connector must leave a token over), the whole part is computed: behind whatever prefix is loaded or
shared, the matrix shapes are those of computing everything, and the results are equal bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvfetcher.engines.paged.blocks import BlockPool, block_hashes
from kvfetcher.engines.paged.contract import RequestData, SchedulerOutput
from kvfetcher.errors import EngineError

if TYPE_CHECKING:
    import torch

    from kvfetcher.engines.paged.contract import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
        Ranks,
    )
    from kvfetcher.engines.paged.model import PagedModel

_log = logging.getLogger(__name__)

State = Literal["waiting", "context", "parked", "generation", "saving", "over"]
EndReason = Literal["stop", "length", "cancelled"]


class NewRequest(NamedTuple):
    """What rank 0 tells the others of a request."""

    request_id: int
    prompt: tuple[int, ...]
    max_tokens: int
    salt: str


class Taken(NamedTuple):
    """One iteration's input."""

    new: tuple[NewRequest, ...]
    cancelled: tuple[int, ...]


@dataclass(slots=True)
class PagedRequest:
    """One request in the engine; what the connector sees of it is TensorRT-LLM's LlmRequest."""

    request_id: int
    prompt_tokens: int
    max_tokens: int
    cache_salt: str
    tokens: list[int]
    """Prompt, then what was generated."""
    state: State = "waiting"
    position: int = 0
    """Tokens with KV."""
    blocks: list[int] = field(default_factory=list)
    is_allocated: bool = False
    cancelled: bool = False
    reused_tokens: int = 0
    loaded_tokens: int = 0

    def get_tokens(self, beam: int) -> list[int]:
        """All token ids, as TensorRT-LLM's request gives them."""
        if beam:
            raise EngineError(f"the paged engine has one beam, asked for number {beam}")
        return list(self.tokens)


@dataclass(slots=True)
class _Told:
    """What the connector's scheduler knows about a request."""

    tokens: int = 0
    blocks: int = 0


@dataclass(slots=True)
class _Async:
    """Asynchronous work by request id."""

    saving: dict[int, PagedRequest] = field(default_factory=dict)
    loading: dict[int, PagedRequest] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """How the loop runs."""

    part_tokens: int
    """A prompt runs in parts that end at multiples of this."""
    max_batch: int
    """Requests in one iteration, at most."""
    tokens_per_block: int
    reuse: bool = True
    """Share blocks of equal prefixes on the device."""
    tells_salt: bool = True
    """Whether the connector may see a request's cache salt (later versions of TensorRT-LLM)."""


@dataclass(slots=True)
class ExecutorCounters:
    """Totals since the start."""

    iterations: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    loaded_tokens: int = 0


class Sink:
    """What an executor's owner wants to know; rank 0 only. Called from the executor's thread."""

    def choose(self, request: PagedRequest, logits: torch.Tensor) -> tuple[int, EndReason | None]:
        """Pick the next token; and whether generation ends with it."""
        raise NotImplementedError

    def over(self, request: PagedRequest, reason: EndReason) -> None:
        """The request has ended; nothing more comes."""
        raise NotImplementedError

    def measured(self, start: int, num_tokens: int, seconds: float) -> None:
        """Learn how long a part of a prompt took, from position `start` on."""


class PagedExecutor:
    """One rank's loop. `step` from one thread; `submit` and `cancel` from any, on rank 0.

    Args:
        model: over the rank's pool.
        ranks: the engine's processes.
        scheduler: the connector's; rank 0 only.
        worker: the connector's.
        rules: see `Rules`.
        sink: rank 0 only.
    """

    def __init__(
        self,
        model: PagedModel,
        *,
        ranks: Ranks,
        scheduler: KvCacheConnectorScheduler | None,
        worker: KvCacheConnectorWorker,
        rules: Rules,
        sink: Sink | None,
    ) -> None:
        if (scheduler is not None) != (ranks.rank == 0) or (sink is not None) != (ranks.rank == 0):
            raise EngineError("scheduler and sink belong on rank 0, and only there")
        self.model = model
        self.rules = rules
        self.counters = ExecutorCounters()
        self._ranks = ranks
        self._scheduler = scheduler
        self._worker = worker
        self._sink = sink
        self.pool = BlockPool(int(model.kv.pool.shape[0]), reuse=rules.reuse)
        self._inbox: deque[NewRequest] = deque()
        self._cancels: deque[int] = deque()
        self.requests: dict[int, PagedRequest] = {}
        self._told: dict[int, _Told] = {}
        self._external: dict[int, int] = {}
        self._started = _Async()
        self._pending = _Async()
        self._done_here = _Async()
        self._register(worker)
        model.hook_layers(
            lambda index: worker.wait_for_layer_load(index, model.stream),
            lambda index: worker.save_kv_layer(index, model.stream),
        )

    # Any thread of rank 0

    def submit(self, request: NewRequest) -> None:
        """Queue a request; `fits` must hold."""
        self._inbox.append(request)

    def cancel(self, request_id: int) -> None:
        """End a request at the next iteration; nothing happens where it is over."""
        self._cancels.append(request_id)

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a request can ever be scheduled."""
        return self._blocks_for(prompt_tokens + max_tokens) <= self.pool.num_blocks

    @property
    def has_input(self) -> bool:
        return bool(self._inbox or self._cancels)

    # The loop: one thread

    @property
    def is_idle(self) -> bool:
        """Nothing runs, loads or saves here."""
        return not self.requests and not self._pending.saving

    @property
    def is_copying(self) -> bool:
        """There is no batch to run, only loads and saves to wait for."""
        return all(request.state == "parked" for request in self.requests.values())

    def step(self) -> None:
        """One iteration; a collective of all ranks."""
        self.counters.iterations += 1
        self._take_input()
        batch = self._schedule()
        self._prepare(batch)
        ended: list[PagedRequest] = []
        if batch:
            batch = self._start_batch(batch)
        if batch:
            ended = self._forward(batch)
        for request in ended + self._cancelled():
            self._finish(request)
        self._get_finished()

    def _register(self, worker: KvCacheConnectorWorker) -> None:
        worker.register_kv_caches(self.model.kv.pool)

    def _cancelled(self) -> list[PagedRequest]:
        """Also those whose load is under way: the connector must hold their blocks by itself."""
        return [request for request in self.requests.values() if request.cancelled]

    def _take_input(self) -> None:
        taken = None
        if self._ranks.rank == 0:
            new = [self._inbox.popleft() for _ in range(len(self._inbox))]
            cancelled = [self._cancels.popleft() for _ in range(len(self._cancels))]
            taken = Taken(tuple(new), tuple(cancelled))
        taken = self._ranks.broadcast(taken)
        for new_request in taken.new:
            self.requests[new_request.request_id] = PagedRequest(
                request_id=new_request.request_id,
                prompt_tokens=len(new_request.prompt),
                max_tokens=new_request.max_tokens,
                cache_salt=new_request.salt,
                tokens=list(new_request.prompt),
            )
        for request_id in taken.cancelled:
            request = self.requests.get(request_id)
            if request is not None:
                request.cancelled = True

    def _schedule(self) -> list[PagedRequest]:
        """First come, first served; a request starts only if it can run to its end (no eviction)."""
        batch: list[PagedRequest] = []
        promised = sum(
            self._blocks_for(r.prompt_tokens + r.max_tokens)
            for r in self.requests.values()
            if r.is_allocated
        )
        promised += sum(len(r.blocks) for r in self._saving_requests())
        for request in self.requests.values():
            if len(batch) == self.rules.max_batch:
                break
            if request.state == "parked" or request.cancelled:
                continue
            if not request.is_allocated:
                needed = self._blocks_for(request.prompt_tokens + request.max_tokens)
                if promised + needed > self.pool.num_blocks:
                    break
                promised += needed
            batch.append(request)
        return batch

    def _saving_requests(self) -> list[PagedRequest]:
        stages = (self._started, self._pending, self._done_here)
        return [request for stage in stages for request in stage.saving.values()]

    def _prepare(self, batch: list[PagedRequest]) -> None:
        for request in batch:
            if not request.is_allocated:
                self._allocate(request)
            elif request.state == "generation":
                self._grow(request, request.position + 1)

    def _allocate(self, request: PagedRequest) -> None:
        size = self.rules.tokens_per_block
        hashes = block_hashes(request.tokens, size, request.cache_salt)
        shared = self.pool.find(hashes[: (request.prompt_tokens - 1) // size])
        keep = self._shared_blocks(len(shared))
        self.pool.free(shared[keep:])
        request.blocks = shared[:keep]
        request.is_allocated = True
        self._grow(request, request.prompt_tokens)
        request.reused_tokens = request.position = keep * size
        self.counters.reused_tokens += request.reused_tokens
        number, is_async = self._ask_connector(request)
        if number == 0 and is_async:
            raise EngineError("the connector offered nothing, asynchronously")
        if request.position + number > request.prompt_tokens - 1:
            raise EngineError(
                f"the connector offered {number} tokens beyond {request.position} of a prompt of"
                f" {request.prompt_tokens}: at least one token must be left to compute"
            )
        request.loaded_tokens = number
        request.position += number
        self.counters.loaded_tokens += number
        self._external[request.request_id] = number
        if is_async:
            self._started.loading[request.request_id] = request
        request.state = "context"
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, list(request.blocks))

    def _ask_connector(self, request: PagedRequest) -> tuple[int, bool]:
        answer = None
        if self._scheduler is not None:
            answer = self._scheduler.get_num_new_matched_tokens(
                self._visible(request), request.position
            )
        number, is_async = self._ranks.broadcast(answer)
        return number, is_async

    def _visible(self, request: PagedRequest) -> Any:
        return request if self.rules.tells_salt else _WithoutSalt(request)

    def _shared_blocks(self, found: int) -> int:
        """Number of `found` blocks to use, so that computing goes on at the end of a part."""
        size, part = self.rules.tokens_per_block, self.rules.part_tokens
        return found * size // part * part // size

    def _grow(self, request: PagedRequest, tokens: int) -> None:
        missing = self._blocks_for(tokens) - len(request.blocks)
        if missing > 0:
            request.blocks += self.pool.allocate(missing)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.rules.tokens_per_block)

    def _start_batch(self, batch: list[PagedRequest]) -> list[PagedRequest]:
        """Metadata and loads; returns the batch without what loads asynchronously."""
        output = self._scheduler_output(batch)
        loading = self._started.loading
        for request in batch:
            if request.request_id in loading:
                request.state = "parked"
        metadata = None
        if self._scheduler is not None:
            metadata = self._scheduler.build_connector_meta(output)
        self._worker.bind_connector_meta(self._ranks.broadcast(metadata))
        self._worker.start_load_kv(self.model.stream)
        return [request for request in batch if request.state != "parked"]

    def _scheduler_output(self, batch: list[PagedRequest]) -> SchedulerOutput:
        output = SchedulerOutput()
        for request in batch:
            if request.request_id in self._started.loading:
                continue
            is_new = request.request_id not in self._told
            told = self._told.setdefault(request.request_id, _Told())
            data = RequestData(
                request_id=request.request_id,
                new_tokens=request.tokens[told.tokens :],
                new_block_ids=request.blocks[told.blocks :],
                computed_position=request.position - self._external.get(request.request_id, 0),
                num_scheduled_tokens=self._part_end(request) - request.position,
            )
            told.tokens, told.blocks = len(request.tokens), len(request.blocks)
            (output.new_requests if is_new else output.cached_requests).append(data)
        self._external.clear()
        return output

    def _part_end(self, request: PagedRequest) -> int:
        position, part = request.position, self.rules.part_tokens
        if position >= request.prompt_tokens:
            return position + 1
        return min(request.prompt_tokens, (position // part + 1) * part)

    def _forward(self, batch: list[PagedRequest]) -> list[PagedRequest]:
        """Run the batch; returns what ended."""
        scored: list[tuple[PagedRequest, torch.Tensor]] = []
        for request in batch:
            start, end = request.position, self._part_end(request)
            if request.state == "context":
                start = start // self.rules.part_tokens * self.rules.part_tokens
            started = time.perf_counter()
            logits = self.model.forward(request.tokens[start:end], request.blocks, start)
            if request.state == "context" and self._sink is not None:
                if self.model.stream is not None:
                    self.model.stream.synchronize()
                self._sink.measured(start, end - start, time.perf_counter() - started)
                self.counters.prefill_tokens += end - start
            request.position = end
            if end >= request.prompt_tokens:
                scored.append((request, logits))
        self._worker.wait_for_save(self.model.stream)
        return [request for request, logits in scored if self._sample(request, logits)]

    def _sample(self, request: PagedRequest, logits: torch.Tensor) -> bool:
        """Append a token; True where generation ends with it."""
        if request.state == "context":
            request.state = "generation"
            self._share(request)
        choice = None if self._sink is None else self._sink.choose(request, logits)
        token, reason = self._ranks.broadcast(choice)
        request.tokens.append(token)
        self.counters.generated_tokens += 1
        if reason is not None and self._sink is not None:
            self._sink.over(request, reason)
        return reason is not None

    def _share(self, request: PagedRequest) -> None:
        """Let others find the full blocks of this request."""
        size = self.rules.tokens_per_block
        full = min(request.position, len(request.tokens)) // size
        hashes = block_hashes(request.tokens[: full * size], size, request.cache_salt)
        self.pool.store(request.blocks[:full], hashes)

    def _finish(self, request: PagedRequest) -> None:
        del self.requests[request.request_id]
        if request.cancelled and self._sink is not None:
            self._sink.over(request, "cancelled")
        if not request.is_allocated:
            request.state = "over"
            return
        pinned = None
        if self._scheduler is not None:
            pinned = self._scheduler.request_finished(request, list(request.blocks))
        self._told.pop(request.request_id, None)
        if self._ranks.broadcast(pinned):
            request.state = "saving"
            self._started.saving[request.request_id] = request
        else:
            self._release(request)

    def _release(self, request: PagedRequest) -> None:
        if request.state == "generation" or request.position >= request.prompt_tokens:
            self._share(request)
        self.pool.free(request.blocks)
        request.blocks = []
        request.state = "over"

    def _get_finished(self) -> None:
        saving, loading = list(self._started.saving), list(self._started.loading)
        self._pending.saving.update(self._started.saving)
        self._pending.loading.update(self._started.loading)
        self._started = _Async()
        saved, loaded = self._worker.get_finished(saving, loading)
        for request_id in saved:
            self._done_here.saving[request_id] = self._pending.saving.pop(request_id)
        for request_id in loaded:
            self._done_here.loading[request_id] = self._pending.loading.pop(request_id)
        everywhere = self._ranks.allgather(
            (list(self._done_here.saving), list(self._done_here.loading))
        )
        for request_id in sorted(set.intersection(*(set(part[0]) for part in everywhere))):
            self._release(self._done_here.saving.pop(request_id))
        for request_id in sorted(set.intersection(*(set(part[1]) for part in everywhere))):
            request = self._done_here.loading.pop(request_id)
            if request.state == "parked":  # and not cancelled meanwhile
                request.state = "context"


class _WithoutSalt:
    """A request as versions before 1.3 show it."""

    def __init__(self, request: PagedRequest) -> None:
        self.request_id = request.request_id
        self.get_tokens = request.get_tokens
