"""Get a stored prefix into leased arena blocks, or say why not.

The executor of `fetch/plan.py`: it owns the semaphores, the deadline and the cancellation, and is
handed the store, the engine's lease service and a callable that decodes and restores one unit, so
it knows no store, no codec and no Triton. It runs on one event loop.

Promise: `fetch` returns a sealed lease only after every byte was fetched, checked, decoded,
restored and checked again. Whatever fails before that makes the hit shorter, with a reason.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvfetcher import container
from kvfetcher.arena import BlockTarget
from kvfetcher.errors import (
    ArenaError,
    ArenaFullError,
    ChunkNotFoundError,
    EngineError,
    FormatError,
    KVFetcherError,
    RequestCancelledError,
    RequestError,
    StoreError,
    StoreTimeoutError,
)
from kvfetcher.fetch.plan import UnitJob, plan_units, probe_batches, usable_chunks
from kvfetcher.fetch.report import FetchReport, Reason
from kvfetcher.keys import ChunkKey, chunk_keys
from kvfetcher.leases import LeaseClaim, tokens_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.config import FetchConfig
    from kvfetcher.container import ChunkHeader
    from kvfetcher.spec import KVSpec
    from kvfetcher.storage.base import Store

_log = logging.getLogger(__name__)

# After the deadline, units that are already being decoded get this long to finish, because their
# blocks cannot be handed to anybody else while a decoder may still write to them.
_DRAIN_SECONDS = 5.0
_CANCEL_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """What decoding and restoring one unit took."""

    decoder: str
    decode_ms: float
    restore_ms: float


RunUnit = Callable[[bytes, BlockTarget], Awaitable[UnitStatus]]


@dataclass(frozen=True, slots=True)
class FetchFacts:
    """What the fetcher must know of the engine and the profile; constant while it runs."""

    identity_digest: bytes
    chunk_tokens: int
    tokens_per_block: int
    spec: KVSpec
    max_prompt_tokens: int


class LeaseService(Protocol):
    """The engine's side: facts and leases (`control.ControlClient` behind threads)."""

    async def facts(self) -> FetchFacts: ...

    async def lease(self, num_tokens: int, ttl_seconds: float) -> tuple[str, BlockTarget]: ...

    async def seal(self, lease_id: str, num_tokens: int, tokens_digest: str) -> None: ...

    async def renew(self, lease_id: str) -> None: ...

    async def release(self, lease_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A lease on ready KV (None = compute everything) and what happened."""

    claim: LeaseClaim | None
    report: FetchReport

    @property
    def lease_json(self) -> str:
        return self.claim.to_json() if self.claim else ""


class Fetcher:
    """Fetches prefixes for many requests at a time.

    Not thread-safe: one event loop. Requests that hit nothing never wait for those that do: only
    requests with stored chunks queue for one of `max_inflight_requests` places.
    """

    def __init__(
        self, *, store: Store, leases: LeaseService, run_unit: RunUnit, config: FetchConfig
    ) -> None:
        self._store = store
        self._leases = leases
        self._run_unit = run_unit
        self._config = config
        self._requests = asyncio.Semaphore(config.max_inflight_requests)
        self._units = asyncio.Semaphore(config.max_inflight_units)
        self._background: set[asyncio.Task[None]] = set()

    async def fetch(
        self,
        input_ids: NDArray[np.int32],
        *,
        cache_salt: str,
        policy: str,
        is_cancelled: Callable[[], bool],
    ) -> Fetched:
        """Fetch the longest stored prefix of `input_ids`.

        Args:
            input_ids: [num_tokens] int32.
            cache_salt: separates tenants; part of every key.
            policy: one of wire.KV_POLICIES.
            is_cancelled: polled while units run.

        Returns:
            A sealed lease that the engine can claim, or none, and the report.

        Raises:
            RequestCancelledError: the client went away; the lease is released.
            RequestError: the prompt is longer than the engine takes.
        """
        started = time.perf_counter()
        report = FetchReport(policy=policy, prompt_tokens=len(input_ids))
        claim = await self._fetch(input_ids, cache_salt, policy, is_cancelled, report)
        report.add_ms("total", (time.perf_counter() - started) * 1e3)
        _log.info(
            "fetch %s: %d of %d tokens, %d bytes, %.0f ms %s %s",
            report.outcome, report.hit_tokens, report.prompt_tokens, report.bytes_fetched,
            report.stages_ms["total"], report.reason, report.detail,
        )  # fmt: skip
        return Fetched(claim, report)

    async def _fetch(
        self,
        input_ids: NDArray[np.int32],
        cache_salt: str,
        policy: str,
        is_cancelled: Callable[[], bool],
        report: FetchReport,
    ) -> LeaseClaim | None:
        if policy in ("recompute", "no_store") or not self._config.enabled:
            report.outcome = "skipped"
            report.give_up("disabled" if policy in ("auto", "fetch") else "policy")
            return None
        try:
            facts = await self._leases.facts()
        except EngineError as exc:
            report.give_up("engine_error", str(exc))
            return None
        if len(input_ids) > facts.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {len(input_ids)} tokens, this engine takes at most"
                f" {facts.max_prompt_tokens}; shorten it"
            )
        usable = usable_chunks(len(input_ids), facts.chunk_tokens)
        if not usable:
            report.give_up("short_prompt")
            return None
        keys = chunk_keys(
            input_ids[: usable * facts.chunk_tokens].tolist(),
            facts.chunk_tokens, facts.identity_digest, cache_salt,
        )  # fmt: skip
        with _timed(report, "lookup"):
            headers = await self._look_up(keys, input_ids, facts, report)
        report.chunks_stored = len(headers)
        if len(headers) * facts.chunk_tokens < self._config.min_hit_tokens:
            report.give_up("too_short" if headers else "not_stored")
            return None
        deadline = time.monotonic() + self._config.deadline_seconds
        if not await self._take_place(report):
            return None
        try:
            if is_cancelled():
                raise RequestCancelledError("the request was cancelled while it waited to fetch")
            claim = await self._restore(
                headers, keys, input_ids, facts, is_cancelled, report, deadline=deadline
            )
        finally:
            self._requests.release()
        if len(headers) < usable:
            report.give_up("not_stored")
        if claim:
            report.outcome = "partial" if report.reason else "hit"
        return claim

    async def _take_place(self, report: FetchReport) -> bool:
        """Wait for one of `max_inflight_requests` places, in order of arrival."""
        try:
            with _timed(report, "wait"):
                await asyncio.wait_for(self._requests.acquire(), self._config.deadline_seconds)
        except TimeoutError:
            report.give_up("deadline", "too many other requests were fetching")
            return False
        return True

    async def _look_up(
        self,
        keys: Sequence[ChunkKey],
        input_ids: NDArray[np.int32],
        facts: FetchFacts,
        report: FetchReport,
    ) -> list[ChunkHeader]:
        """Headers of the stored chunks from position 0 on, up to the first that is not usable."""
        headers: list[ChunkHeader] = []
        for batch in probe_batches(len(keys)):
            found = await asyncio.gather(
                *(self._read_header(keys[i], report) for i in batch), return_exceptions=True
            )
            for index, result in zip(batch, found, strict=True):
                tokens = input_ids[index * facts.chunk_tokens : (index + 1) * facts.chunk_tokens]
                if isinstance(result, ChunkNotFoundError):
                    return headers
                if isinstance(result, BaseException):
                    await self._note_failure(keys[index].name, result, report)
                    return headers
                problem = _mismatch(result, keys[index], tokens, facts)
                if problem:
                    report.give_up("identity_mismatch", f"{keys[index].name}: {problem}")
                    return headers
                headers.append(result)
        return headers

    async def _read_header(self, key: ChunkKey, report: FetchReport) -> ChunkHeader:
        prefix = await self._store.get_range(key.name, 0, container.HEADER_READ_BYTES)
        needed = container.header_size(prefix)
        if needed > len(prefix):
            prefix += await self._store.get_range(key.name, len(prefix), needed)
        report.bytes_fetched += len(prefix)
        return container.parse_header(prefix)

    async def _restore(
        self,
        headers: list[ChunkHeader],
        keys: Sequence[ChunkKey],
        input_ids: NDArray[np.int32],
        facts: FetchFacts,
        is_cancelled: Callable[[], bool],
        report: FetchReport,
        *,
        deadline: float,
    ) -> LeaseClaim | None:
        num_tokens = len(headers) * facts.chunk_tokens
        try:
            lease_id, target = await self._leases.lease(num_tokens, self._config.lease_ttl_seconds)
        except (ArenaError, EngineError) as exc:
            full = isinstance(exc, ArenaFullError)
            report.give_up("arena_full" if full else "engine_error", str(exc))
            return None
        jobs = plan_units(
            headers, [k.name for k in keys[: len(headers)]], target, facts.tokens_per_block
        )
        run = _Run(self, jobs, facts, report, num_chunks=len(headers))
        try:
            chunks = await run.finish(is_cancelled, deadline)
        except BaseException:
            self._release_later(lease_id, run)
            raise
        if run.is_live:  # a decoder may still write: these blocks cannot be promised to anybody
            self._release_later(lease_id, run)
            return None
        hit_tokens = chunks * facts.chunk_tokens
        try:
            if not hit_tokens:
                await self._leases.release(lease_id)
                return None
            await self._leases.seal(lease_id, hit_tokens, tokens_digest(input_ids[:hit_tokens]))
        except (ArenaError, EngineError) as exc:
            report.give_up("engine_error", str(exc))
            return None
        report.hit_tokens, report.chunks_hit = hit_tokens, chunks
        report.bytes_bf16 = hit_tokens * facts.spec.elements_per_token * 2
        report.profile = headers[0].profile
        return LeaseClaim(lease_id, hit_tokens, target.generation)

    async def _run_job(self, job: UnitJob, facts: FetchFacts, report: FetchReport) -> None:
        """Transfer, check, decode and restore one unit.

        The place among `max_inflight_units` is held for all of it: that bounds memory too.
        """
        async with self._units:
            with _timed(report, "transfer"):
                start, stop = job.entry.offset, job.entry.offset + job.entry.length
                data = await self._store.get_range(job.object_name, start, stop)
            report.bytes_fetched += len(data)
            container.check_unit(job.header, job.entry, data)
            status = await _finish_even_if_cancelled(self._run_unit(data, job.target))
        report.units += 1
        report.decoders[status.decoder] = report.decoders.get(status.decoder, 0) + 1
        report.add_ms("decode", status.decode_ms)
        report.add_ms("restore", status.restore_ms)

    async def _note_failure(self, name: str, exc: BaseException, report: FetchReport) -> None:
        """Turn a failure into the report's reason; a corrupt object is set aside."""
        detail = f"{name}: {exc}"
        if isinstance(exc, FormatError):
            report.give_up("corrupt_chunk", detail)
            _log.warning("corrupt chunk %s set aside: %s", name, exc)
            try:
                await self._store.quarantine(name, str(exc))
            except StoreError as failed:
                _log.warning("chunk %s could not be set aside: %s", name, failed)
            return
        reason: Reason
        if isinstance(exc, StoreTimeoutError):
            reason = "store_timeout"
        elif isinstance(exc, StoreError):
            reason = "store_error"
        elif isinstance(exc, KVFetcherError):
            reason = "decode_error"
        elif isinstance(exc, Exception):
            _log.error("unexpected %s on %s", type(exc).__name__, name, exc_info=exc)
            reason, detail = "decode_error", f"{name}: {type(exc).__name__}"
        else:
            raise exc
        report.give_up(reason, detail)

    def _release_later(self, lease_id: str, run: _Run) -> None:
        """Give a lease back once nothing writes to its blocks any more."""

        async def release() -> None:
            await run.drained()
            try:
                await self._leases.release(lease_id)
            except KVFetcherError as exc:
                _log.warning("lease %s not released: %s", lease_id, exc)

        task = asyncio.create_task(release())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class _Run:
    """The units of one request, running: which chunks are whole, and what is still live."""

    def __init__(
        self,
        fetcher: Fetcher,
        jobs: list[UnitJob],
        facts: FetchFacts,
        report: FetchReport,
        *,
        num_chunks: int,
    ) -> None:
        self._fetcher = fetcher
        self._report = report
        self._end = num_chunks  # chunks from here on are given up
        self._tasks: dict[asyncio.Task[None], UnitJob] = {
            asyncio.create_task(fetcher._run_job(job, facts, report)): job for job in jobs
        }
        self._cancelled: set[asyncio.Task[None]] = set()

    @property
    def is_live(self) -> bool:
        return any(not task.done() for task in self._tasks)

    async def finish(self, is_cancelled: Callable[[], bool], deadline: float) -> int:
        """Wait for the units; the number of whole chunks from position 0 on.

        Args:
            is_cancelled: polled meanwhile.
            deadline: on `time.monotonic`; what is not finished then is given up.
        """
        pending = set(self._tasks)
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_CANCEL_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                if not task.cancelled() and task.exception() is not None:
                    await self._fail(task)
            if pending and is_cancelled():
                self._cancel_from(0)
                raise RequestCancelledError("the request was cancelled while its KV was fetched")
            if pending and time.monotonic() > deadline:
                self._report.give_up("deadline", f"{len(pending)} units were not finished in time")
                unfinished = min(self._tasks[task].chunk_index for task in pending)
                self._cancel_from(unfinished)
                await asyncio.wait(pending, timeout=_DRAIN_SECONDS)
                break
        return self._end

    async def drained(self) -> None:
        """Return when no unit of this run can write any more."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fail(self, task: asyncio.Task[None]) -> None:
        job, exc = self._tasks[task], task.exception()
        assert exc is not None
        if job.chunk_index < self._end:
            self._cancel_from(job.chunk_index)
            await self._fetcher._note_failure(job.object_name, exc, self._report)

    def _cancel_from(self, chunk_index: int) -> None:
        self._end = min(self._end, chunk_index)
        for task, job in self._tasks.items():
            if job.chunk_index >= self._end and task not in self._cancelled:
                self._cancelled.add(task)  # once only: a second cancel would end its draining
                task.cancel()


async def _finish_even_if_cancelled(unit: Awaitable[UnitStatus]) -> UnitStatus:
    """Await a unit that has reached a decoder.

    Cancelled, it still waits for the decoder before it ends, because until then the decoder may
    write to the unit's blocks.
    """
    running = asyncio.ensure_future(unit)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _mismatch(
    header: ChunkHeader, key: ChunkKey, tokens: NDArray[np.int32], facts: FetchFacts
) -> str:
    """Why a stored chunk is not the one that was asked for; "" if it is."""
    if header.identity != facts.identity_digest:
        return "identity digest differs"
    if header.chunk_key != key.key or header.parent_key != key.parent:
        return "chunk key differs from the object's name"
    if header.first_position != key.index * facts.chunk_tokens:
        return "first position differs"
    if not np.array_equal(np.asarray(header.token_ids, dtype=np.int64), tokens):
        return "token ids differ although the keys agree"
    return ""


@contextmanager
def _timed(report: FetchReport, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        report.add_ms(stage, (time.perf_counter() - started) * 1e3)
