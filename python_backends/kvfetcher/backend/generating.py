"""`tensorrt_llm`: one request through the engine, as Triton responses, and its saving afterwards."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher import wire
from kvfetcher.backend.leases import EngineLeases
from kvfetcher.backend.metrics import GENERATE_SERIES, Metrics
from kvfetcher.backend.params import GenerationOptions, open_options
from kvfetcher.backend.saving import seal_ticket
from kvfetcher.backend.tags import compare
from kvfetcher.backend.tensors import count_tensor, ids_tensor, read_ids, read_text, text_tensor
from kvfetcher.engines.base import GenerateEvent, GenerateRequest
from kvfetcher.errors import RequestError
from kvfetcher.fetch.report import tell_computed
from kvfetcher.memory.control import run_dir
from kvfetcher.memory.leases import LeaseClaim
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.vitals import mark_suspect

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from numpy.typing import NDArray

    from kvfetcher.config import Config
    from kvfetcher.engines.host import EngineHost
    from kvfetcher.fetch.planning.gate import Regret
    from kvfetcher.memory.leases import SaveTicket

_log = logging.getLogger(__name__)

# How often to look for a client that went away, and to send a heartbeat.
_POLL_SECONDS = 0.1


@dataclass(slots=True)
class Generation:
    """One request to the engine and what is known of it so far."""

    input_ids: NDArray[np.int32]
    options: GenerationOptions
    claim: LeaseClaim | None
    report: dict[str, Any]
    request_id: str
    pb_utils: Any
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    stream_id: str = ""
    ticket: SaveTicket | None = None
    _regret: Regret | None = None
    _started: float = field(default_factory=time.monotonic)
    _first_token_seconds: float | None = None

    @classmethod
    def read(
        cls, request: Any, pb_utils: Any, permits: Permits, *, is_open: bool = False
    ) -> Generation:
        """Read and check a Triton request.

        Args:
            request: Triton's request.
            pb_utils: the module `triton_python_backend_utils`.
            permits: permits of the server run.
            is_open: see `params.open_options`.

        Raises:
            PermissionDeniedError: it was not issued by `kv_fetch`.
            RequestError, LeaseError: an input is not what it should be.
            MixedUpError: what `kv_fetch` sent belongs to another request.
        """
        input_ids = read_ids(request, wire.INPUT_IDS, pb_utils)
        sampling = read_text(request, wire.SAMPLING, pb_utils, default="")
        lease = read_text(request, wire.KV_LEASE, pb_utils, default="")
        options = open_options(sampling, permits, input_ids=input_ids, lease=lease, is_open=is_open)
        report = read_text(request, wire.KV_REPORT, pb_utils, default="")
        try:
            facts = json.loads(report) if report else {}
        except (ValueError, RecursionError) as exc:
            raise RequestError(f"input {wire.KV_REPORT!r} is not JSON: {exc}") from exc
        if not isinstance(facts, dict):
            raise RequestError(f"input {wire.KV_REPORT!r} must be a JSON object")
        if options.request_id:
            compare(options.request_id, request.request_id(), model=wire.KV_FETCH, run_folder=None)
            facts["request_id"] = options.request_id
        return cls(
            input_ids=input_ids,
            options=options,
            claim=LeaseClaim.from_json(lease),
            report=facts,
            request_id=request.request_id(),
            pb_utils=pb_utils,
        )

    async def responses(
        self, host: EngineHost, is_cancelled: Callable[[], bool]
    ) -> AsyncIterator[tuple[Any, bool]]:
        """Triton responses in order, each with whether it is the last; None = nobody is there.

        Streaming, one response per event of the engine; otherwise a single one at the end; with
        heartbeats, empty ones between. After the last one the iterator goes on until `ticket` is
        known; `is_cancelled` is not called any more then (tritonserver 2.51 crashes when a closed
        response sender is asked).

        Raises:
            KVFetcherError: the engine refused or failed.
        """
        if self.options.fetch_id:
            if is_cancelled():
                host.streams.cancel(self.options.fetch_id)
            yield None, True
            return
        if not self.options.generate:
            yield self._response(GenerateEvent(finish_reason="warmed"), report=True), True
            return
        request = GenerateRequest(
            input_ids=tuple(self.input_ids.tolist()),
            sampling=self.options.params,
            lease=self.claim,
            save=self.options.save,
            cache_salt=self.options.cache_salt,
            request_id=self.request_id,
        )
        with host.streams.open() as (self.stream_id, gone):
            generated = host.engine.generate(request, is_cancelled=gone.is_set)
            is_answered, looked = False, time.monotonic()
            async for event in _with_pauses(generated, _POLL_SECONDS):
                if not is_answered and time.monotonic() - looked >= _POLL_SECONDS:
                    looked = time.monotonic()
                    if is_cancelled():
                        gone.set()
                    if self.options.heartbeat:
                        yield self._response(GenerateEvent(), report=False), False
                if event is None:
                    continue
                if event.save is not None:
                    self.ticket = event.save
                    continue
                is_first = not self.output_ids
                is_answered = bool(event.finish_reason)
                self._take(event)
                if is_answered or self.options.stream:
                    yield self._response(event, report=is_first or is_answered), is_answered

    def count(self, metrics: Metrics) -> None:
        """Count the time to the first token, and how the gate's decision to compute turned out."""
        if self._first_token_seconds is not None and "outcome" in self.report:
            metrics.observe(
                "kvfetcher_time_to_first_token_seconds",
                self._first_token_seconds,
                outcome=str(self.report["outcome"]),
            )
        if (result := self._regret) is not None:
            metrics.observe("kvfetcher_gate_compute_error_seconds", abs(result.error_seconds))
            metrics.add("kvfetcher_gate_compute_lost_seconds_total", result.loss_seconds)
            metrics.add("kvfetcher_gate_compute_gained_seconds_total", -result.loss_seconds)

    def _take(self, event: GenerateEvent) -> None:
        if event.new_token_ids and not self.output_ids:
            fetched_ms = self.report.get("stages_ms", {}).get("total", 0.0)
            self._first_token_seconds = time.monotonic() - self._started + fetched_ms / 1e3
        self.output_ids.extend(event.new_token_ids)
        self.text += event.text_delta
        if event.timings is not None:
            self.report["engine"] = asdict(event.timings)
            self._regret = tell_computed(self.report, event.timings.prefill_ms)

    def _response(self, event: GenerateEvent, *, report: bool) -> Any:
        pb_utils = self.pb_utils
        if event.finish_reason == "cancelled":
            return None
        whole = event.finish_reason and not self.options.stream
        ids = tuple(self.output_ids) if whole else event.new_token_ids
        text = self.text if whole else event.text_delta
        return pb_utils.InferenceResponse(
            output_tensors=[
                text_tensor(wire.TEXT_OUTPUT, text, pb_utils),
                ids_tensor(wire.OUTPUT_IDS, ids, pb_utils),
                text_tensor(wire.FINISH_REASON, event.finish_reason, pb_utils),
                text_tensor(wire.KV_REPORT, json.dumps(self.report) if report else "", pb_utils),
                count_tensor(wire.NUM_INPUT_TOKENS, len(self.input_ids), pb_utils),
                text_tensor(wire.STREAM_ID, self.stream_id, pb_utils),
            ]
        )


class SaveQueue:
    """Hands finished requests' KV to `kv_save`, at most `max_pending` at a time.

    Saving never delays a request: it starts after the last response, and one too many is dropped
    and counted.
    """

    def __init__(self, config: Config, pb_utils: Any) -> None:
        self._max_pending = config.save.max_pending
        self._leases = EngineLeases(config)
        self._permits = Permits.of_run()
        self._pb_utils = pb_utils
        self._metrics = Metrics(pb_utils)
        self._metrics.start(GENERATE_SERIES)
        self._pending = 0

    async def save(self, ticket: SaveTicket | None) -> None:
        """Save what a request computed; failures are logged and counted, never raised."""
        if ticket is None:
            return
        if self._pending >= self._max_pending:
            self._metrics.add("kvfetcher_saves_dropped_total")
            await self._leases.release(ticket.lease_id)
            return
        self._pending += 1
        self._metrics.add("kvfetcher_saves_pending", 1)
        try:
            await self._call(ticket)
        finally:
            self._pending -= 1
            self._metrics.add("kvfetcher_saves_pending", -1)

    async def _call(self, ticket: SaveTicket) -> None:
        pb_utils = self._pb_utils
        ids = np.asarray(ticket.token_ids, np.int32)
        sealed = seal_ticket(ticket, ids, self._permits)
        response = await pb_utils.InferenceRequest(
            model_name=wire.KV_SAVE,
            requested_output_names=[wire.KV_REPORT],
            inputs=[
                ids_tensor(wire.INPUT_IDS, ids, pb_utils),
                text_tensor(wire.KV_LEASE, sealed, pb_utils),
            ],
        ).async_exec()
        if response.has_error():
            _log.warning("kv_save: %s", response.error().message())
            self._metrics.add("kvfetcher_save_errors_total")
            return
        text = pb_utils.get_output_tensor_by_name(response, wire.KV_REPORT).as_numpy()
        report = json.loads(text.reshape(-1)[0])
        if report["lease_id"] != ticket.lease_id:
            _log.error("kv_save replied to another request")
            mark_suspect(run_dir(), wire.KV_SAVE)
            self._metrics.add("kvfetcher_save_errors_total")
            return
        self._metrics.add("kvfetcher_saved_chunks_total", report["chunks_saved"])
        self._metrics.add("kvfetcher_saved_bytes_total", report["bytes_saved"])
        if report["error"]:
            self._metrics.add("kvfetcher_save_errors_total")

    def close(self) -> None:
        """Drop the series and the connection."""
        self._metrics.close()
        self._leases.close()


async def _with_pauses(
    events: AsyncGenerator[GenerateEvent], seconds: float
) -> AsyncIterator[GenerateEvent | None]:
    """The events, and None whenever none came for `seconds`. Leaving it closes `events`."""
    upcoming: asyncio.Future[GenerateEvent] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({upcoming}, timeout=seconds))[0]:
                yield None
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if upcoming is not None and not upcoming.done():
            upcoming.cancel()
            await asyncio.wait({upcoming})
        await events.aclose()
