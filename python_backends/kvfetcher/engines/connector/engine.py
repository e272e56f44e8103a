"""An engine whose KV comes and goes through the KV connector: text, leases and saving around its tokens.

Serves TensorRT-LLM and the paged torch engine alike (`tokens.TokenSource`). A request is announced to the
connector before the engine gets it; its lease stays claimed until the connector says that nobody reads it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvfetcher.engines.admission import check_request, claim_lease, stop_rules
from kvfetcher.engines.base import EngineInfo, GenerateEvent, GenerateTimings, SamplingParams
from kvfetcher.engines.text_stream import AnswerText
from kvfetcher.errors import EngineBusyError, EngineError, LeaseError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from kvfetcher.config import Config
    from kvfetcher.engines.admission import StopRules
    from kvfetcher.engines.base import FinishReason, GenerateRequest
    from kvfetcher.engines.connector.server import ConnectorHub, Handle
    from kvfetcher.engines.detokenize import Decodes
    from kvfetcher.engines.tokens import TokenRun, TokenSource, TokenStep
    from kvfetcher.memory.arena import Arena
    from kvfetcher.memory.leases import LeaseTable, SaveTicket
    from kvfetcher.spec import ModelIdentity, RopeFacts

_log = logging.getLogger(__name__)

# The connector answers from a thread of the engine's process, which a forward pass may hold up.
_ANNOUNCE_SECONDS = 2.0
_NEWS_SECONDS = 0.05
_POLL_SECONDS = 0.05
_START_SECONDS = 120.0


class ServedModel(Protocol):
    """What must be known of the model; `loader.LoadedModel` is one."""

    @property
    def folder(self) -> Path: ...
    @property
    def tokenizer(self) -> Decodes: ...
    @property
    def device(self) -> Any: ...
    @property
    def identity(self) -> ModelIdentity: ...
    @property
    def rope(self) -> RopeFacts: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


@dataclass(slots=True)
class ConnectedCounters:
    """Totals since the start. Under the engine's lock."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    leases_used: int = 0
    leases_refused: int = 0
    saves: int = 0


class ConnectedEngine:
    """See the module's text; methods as in `base.Engine`. Call `close` when done.

    Args:
        kind: kind of the engine ("paged" or "tensorrt_llm").
        model: what it serves.
        config: the whole configuration.
        source: the engine; closed with this.
        hub: the connector's other end; stays the caller's to close, after the engine.
        arena: stays the caller's, as do the leases.
        leases: over the arena's blocks.
        on_lost: told the reason, from a thread, when the engine's ranks go unexpectedly once it has
            started; until then that is an EngineError. None = requests fail, nothing else.
        clock: seconds, monotonic; the one that the control server leases with.

    Raises:
        EngineError: the connector's ranks did not register, or the pool's layout cannot be found.
    """

    def __init__(
        self,
        kind: str,
        model: ServedModel,
        config: Config,
        *,
        source: TokenSource,
        hub: ConnectorHub,
        arena: Arena,
        leases: LeaseTable,
        on_lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_lost = on_lost
        self._kind = kind
        self._model = model
        self._config = config
        self._source = source
        self._hub = hub
        self._arena = arena
        self._leases = leases
        self._clock = clock
        self.max_prompt_tokens = min(
            config.engine.max_prompt_tokens or model.max_positions - 1, model.max_positions - 1
        )
        self._lock = threading.Lock()
        self._counters = ConnectedCounters()
        self._running = self._in_engine = 0
        self._closing = False
        hub.wait_ready(_START_SECONDS)
        _run_apart(self._probe(), _START_SECONDS)
        hub.wait_layout(_START_SECONDS)
        hub.when_lost(self._lost)

    def describe(self) -> EngineInfo:
        model = self._model
        return EngineInfo(
            engine=self._kind,
            model=str(model.folder),
            device=str(model.device),
            identity=model.identity,
            tokens_per_block=self._arena.tokens_per_block,
            chunk_tokens=self._config.codec.chunk_tokens,
            arena=self._arena.paths,
            generation=self._arena.generation,
            eos_ids=model.eos_ids,
            vocab_size=model.vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self._config.engine.max_output_tokens,
            prefill_tokens_per_second=1 / self._source.prefill.base_seconds,
            rope=model.rope,
        )

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {
                **asdict(self._counters),
                "running": self._running,
                "prefill": asdict(self._source.prefill),
                "connector": {**asdict(self._hub.counters), "open": self._hub.num_open},
                "kv_layouts": list(self._hub.layouts),
                "kv_layout_proven": self._hub.is_layout_proven,
                "dead": self._hub.dead,
            }

    async def generate(
        self, request: GenerateRequest, *, is_cancelled: Callable[[], bool] | None = None
    ) -> AsyncGenerator[GenerateEvent]:
        max_tokens = check_request(
            request,
            vocab_size=self._model.vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self._config.engine.max_output_tokens,
            max_positions=self._model.max_positions,
        )
        rules = stop_rules(
            self._model.tokenizer,
            eos_ids=self._model.eos_ids,
            stop_words=request.sampling.stop_words,
        )
        limits = _Limits(max_tokens, rules)
        self._enter()
        is_in_engine = True
        try:
            async for event in self._serve(request, limits, is_cancelled or _never):
                if is_in_engine and event.finish_reason:
                    # What follows is waiting for the save, which takes nobody's place.
                    is_in_engine = False
                    self._count(in_engine=-1)
                yield event
        except Exception:
            self._count(failed=1)
            raise
        finally:
            self._count(running=-1, in_engine=-int(is_in_engine))

    def close(self) -> None:
        with self._lock:
            self._closing = True
        self._hub.expect_end()
        self._source.close()

    async def _serve(
        self, request: GenerateRequest, limits: _Limits, is_cancelled: Callable[[], bool]
    ) -> AsyncGenerator[GenerateEvent]:
        lease, lease_error = claim_lease(
            request,
            generation=self._arena.generation,
            leases=self._leases,
            now=self._clock(),
        )
        self._count(leases_refused=int(bool(lease_error)))
        wants_save = request.save and self._config.save.enabled
        handle = self._hub.announce(
            request.input_ids, cache_salt=request.cache_salt, lease=lease, save=wants_save
        )
        answer = _Answer(request, self._model, limits, handle, lease_error)
        has_ticket = False
        try:
            async for event in self._answer(request, answer, limits, is_cancelled):
                yield event
            if wants_save and (ticket := await self._ticket(handle)) is not None:
                has_ticket = True
                self._count(saves=1)
                yield GenerateEvent(save=ticket)
        finally:
            if not has_ticket:
                handle.ticket.add_done_callback(self._throw_away)

    async def _answer(
        self,
        request: GenerateRequest,
        answer: _Answer,
        limits: _Limits,
        is_cancelled: Callable[[], bool],
    ) -> AsyncGenerator[GenerateEvent]:
        run: TokenRun | None = None
        is_over = is_whole = False
        try:
            await _settled(answer.handle.is_announced, _ANNOUNCE_SECONDS)
            run = self._source.start(
                request.input_ids,
                request.sampling,
                max_tokens=limits.max_tokens,
                eos_ids=limits.rules.ids,
                cache_salt=request.cache_salt,
            )
            async for step in _with_pauses(run, _POLL_SECONDS):
                if is_cancelled():
                    self._count(cancelled=1)
                    is_whole = True
                    yield answer.cancelled(run)
                    return
                if step is None:
                    continue
                is_over = bool(step.finish_reason)
                is_first = not answer.num_generated
                if is_first:
                    # What was loaded is told with the first token; the news came before it, but may
                    # still be on its way through the socket.
                    await _settled(answer.handle.is_matched, _NEWS_SECONDS)
                event = answer.take(step, run)
                if event is None:
                    continue
                if is_first and self._in_engine == 1 and event.timings is not None:
                    computed = event.timings.computed_tokens
                    self._source.note_first_token(
                        len(request.input_ids) - computed, computed, event.timings.prefill_ms / 1e3
                    )
                is_whole = bool(event.finish_reason)
                yield event
                if is_whole:
                    self._note_end(answer)
                    return
            raise EngineError("the engine ended a request without a reason")
        finally:
            if run is not None and not is_over:
                run.abort()
            self._hub.settle(answer.handle, save=is_whole)

    def _note_end(self, answer: _Answer) -> None:
        self._count(
            finished=1,
            generated_tokens=answer.num_generated,
            cached_tokens=answer.cached_tokens,
            leases_used=int(answer.cached_tokens > 0),
        )

    async def _ticket(self, handle: Handle) -> SaveTicket | None:
        seconds = 2 * self._config.connector.save_timeout_seconds
        if not await _settled(handle.ticket, seconds):
            _log.warning("a finished request is not saved: the engine's ranks did not answer")
            return None
        return handle.ticket.result()

    def _throw_away(self, future: concurrent.futures.Future[SaveTicket | None]) -> None:
        """Give the blocks of a ticket back that nobody will use."""
        ticket = future.result()
        if ticket is not None:
            try:
                self._leases.release(ticket.lease_id, now=self._clock())
            except LeaseError as exc:  # it expired first
                _log.info("%s", exc)

    async def _probe(self) -> None:
        """One repeated token, so that the connector finds how the pool's blocks are ordered."""
        prompt = (1 % self._model.vocab_size,) * (2 * self._arena.tokens_per_block)
        handle = self._hub.announce(prompt, cache_salt="", lease=None, save=False, probe=True)
        if not await _settled(handle.is_announced, _START_SECONDS):
            raise EngineError("the KV connector did not answer the layout probe")
        run = self._source.start(
            prompt, SamplingParams(max_tokens=1), max_tokens=1, eos_ids=(), cache_salt=""
        )
        async for _ in run.steps():
            pass
        self._hub.settle(handle, save=True)
        is_over = await _settled(handle.is_matched, _START_SECONDS)
        if not (is_over and handle.is_matched.result()):
            raise EngineError(
                self._hub.dead
                or "the engine ran the layout probe without asking the KV connector; see its log for"
                " lines of kvfetcher.engines.connector"
            )

    def _lost(self, reason: str) -> None:
        if self.on_lost is not None:
            self.on_lost(reason)

    def _enter(self) -> None:
        engine = self._config.engine
        with self._lock:
            if self._closing or self._hub.dead:
                raise EngineError(self._hub.dead or "the engine is closed")
            if self._in_engine >= engine.max_running_requests + engine.max_waiting_requests:
                self._counters.refused += 1
                raise EngineBusyError(
                    f"{self._in_engine} requests run or wait, which is all that"
                    " engine.max_running_requests and engine.max_waiting_requests allow; try again"
                    " later"
                )
            self._running += 1
            self._in_engine += 1

    def _count(self, *, running: int = 0, in_engine: int = 0, **changes: int) -> None:
        with self._lock:
            self._running += running
            self._in_engine += in_engine
            for name, change in changes.items():
                setattr(self._counters, name, getattr(self._counters, name) + change)


class _Limits(NamedTuple):
    """Where one answer ends at the latest, and what ends it before."""

    max_tokens: int
    rules: StopRules


class _Answer:
    """One answer as events."""

    def __init__(
        self,
        request: GenerateRequest,
        model: ServedModel,
        limits: _Limits,
        handle: Handle,
        lease_error: str,
    ) -> None:
        self.handle = handle
        self.num_generated = 0
        self._request = request
        self._tokenizer = model.tokenizer
        self._lease_error = lease_error
        self._text = AnswerText(
            model.tokenizer,
            prompt=request.input_ids,
            eos_ids=limits.rules.ids,
            stop_words=limits.rules.words,
            max_tokens=limits.max_tokens,
        )
        self._submitted = time.perf_counter()
        self._first_token = 0.0

    @property
    def cached_tokens(self) -> int:
        return self.handle.matched.num_loaded_tokens if self.handle.matched else 0

    def take(self, step: TokenStep, run: TokenRun) -> GenerateEvent | None:
        """The event of a step; None where it has nothing to say."""
        ids: list[int] = []
        text, reason = "", ""
        for token in step.token_ids:
            ids.append(token)
            part, reason = self._text.add(token)
            text += part
            if reason:
                break
        if not reason and step.finish_reason:  # the engine ended it and kept the last token
            last = self._text.finish()
            text, reason = text + last.text, last.reason or step.finish_reason
        if not ids and not reason:
            return None
        first = not self._first_token
        if first:
            self._first_token = time.perf_counter()
        self.num_generated += len(ids)
        new_ids = tuple(ids)
        if first and not self._request.sampling.exclude_input_in_output:
            prompt = list(self._request.input_ids)
            text = self._tokenizer.decode(prompt, skip_special_tokens=True) + text
            new_ids = self._request.input_ids + new_ids
        timings = self._timings(run) if first or reason else None
        return GenerateEvent(new_ids, text, _reason(reason), timings)

    def cancelled(self, run: TokenRun) -> GenerateEvent:
        return GenerateEvent((), "", "cancelled", self._timings(run))

    def _timings(self, run: TokenRun) -> GenerateTimings:
        now = time.perf_counter()
        matched = self.handle.matched
        held = matched.num_computed_tokens if matched else 0
        prompt_tokens = len(self._request.input_ids)
        computed = prompt_tokens - held - self.cached_tokens
        until_first = (self._first_token or now) - self._submitted
        prefill = max(0.0, until_first - run.queue_seconds)
        return GenerateTimings(
            queue_ms=1e3 * min(run.queue_seconds, until_first),
            load_ms=0.0,  # runs on the engine's stream, as part of the first pass
            prefill_ms=1e3 * prefill,
            computed_tokens=computed,
            cached_tokens=self.cached_tokens,
            prefill_rate=computed / prefill if prefill else 0.0,
            generated_tokens=self.num_generated,
            total_ms=1e3 * (now - self._submitted),
            lease_error=self._why_unused(),
            metrics=run.metrics,
        )

    def _why_unused(self) -> str:
        offered = self.handle.announce.lease_tokens
        if self._lease_error or not offered or self.cached_tokens:
            return self._lease_error
        matched = self.handle.matched
        return matched.reason if matched else "the engine did not recognise the request in time"


def _reason(text: str) -> FinishReason:
    return text  # type: ignore[return-value]


def _never() -> bool:
    return False


async def _settled(future: concurrent.futures.Future[Any], seconds: float) -> bool:
    """Wait for a thread's future; False when it takes longer."""
    if future.done():
        return True
    done, _ = await asyncio.wait({asyncio.wrap_future(future)}, timeout=seconds)
    return bool(done)


async def _with_pauses(run: TokenRun, seconds: float) -> AsyncIterator[TokenStep | None]:
    """The steps of a run, and None whenever none came for `seconds`."""
    steps = run.steps()
    upcoming: asyncio.Future[TokenStep] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(steps))
            while not (await asyncio.wait({upcoming}, timeout=seconds))[0]:
                yield None
            try:
                step = upcoming.result()
            except StopAsyncIteration:
                return
            yield step
    finally:
        if upcoming is not None and not upcoming.done():
            upcoming.cancel()
            await asyncio.wait({upcoming})


def _run_apart(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Run a coroutine to its end in a thread with a loop of its own (the caller may be in one).

    Raises:
        EngineError: it took too long; or what it raised.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(asyncio.run, asyncio.wait_for(work, seconds)).result()
        except TimeoutError as exc:
            raise EngineError(
                f"the engine did not answer a first request in {seconds:g} s"
            ) from exc
