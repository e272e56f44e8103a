"""`tensorrt_llm`: one request through the engine, as Triton responses, and its saving afterwards."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher import wire
from kvfetcher.engines.base import Engine, GenerateEvent, GenerateRequest, SamplingParams
from kvfetcher.errors import RequestCancelledError, RequestError
from kvfetcher.leases import LeaseClaim, SaveTicket
from kvfetcher.serving.metrics import Metrics
from kvfetcher.serving.params import SamplingRequest
from kvfetcher.serving.tensors import ids_tensor, read_ids, read_text, text_tensor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from numpy.typing import NDArray

    from kvfetcher.config import Config

_log = logging.getLogger(__name__)

_CANCEL_POLL_SECONDS = 0.05


@dataclass(slots=True)
class Generation:
    """One request to the engine and what is known of it so far."""

    input_ids: NDArray[np.int32]
    sampling: SamplingRequest
    claim: LeaseClaim | None
    report: dict[str, Any]
    pb_utils: Any
    request_id: str
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    ticket: SaveTicket | None = None

    @classmethod
    def read(cls, request: Any, pb_utils: Any) -> Generation:
        """Read and check a Triton request.

        Raises:
            RequestError, LeaseError: an input is not what it should be.
        """
        report = read_text(request, wire.KV_REPORT, pb_utils, default="")
        try:
            facts = json.loads(report) if report else {}
        except ValueError as exc:
            raise RequestError(f"input {wire.KV_REPORT!r} is not JSON: {exc}") from exc
        return cls(
            input_ids=read_ids(request, wire.INPUT_IDS, pb_utils),
            sampling=SamplingRequest.from_json(
                read_text(request, wire.SAMPLING, pb_utils, default="")
            ),
            claim=LeaseClaim.from_json(read_text(request, wire.KV_LEASE, pb_utils, default="")),
            report=facts,
            pb_utils=pb_utils,
            request_id=request.request_id(),
        )

    async def responses(
        self, engine: Engine, is_cancelled: Callable[[], bool]
    ) -> AsyncIterator[tuple[Any, bool]]:
        """Triton responses in order, each with whether it is the last.

        Streaming, one response per event of the engine; otherwise a single one at the end.

        Raises:
            RequestCancelledError: the client went away; the engine has dropped the request.
            KVFetcherError: the engine refused or failed.
        """
        async with aclosing(engine.generate(self._engine_request())) as events:
            async for event in _until_cancelled(events, is_cancelled):
                is_last = bool(event.finish_reason)
                self.output_ids.extend(event.new_token_ids)
                self.text += event.text_delta
                self._note(event)
                if is_last or self.sampling.stream:
                    yield self._response(event, is_last), is_last

    def _engine_request(self) -> GenerateRequest:
        s = self.sampling
        return GenerateRequest(
            input_ids=tuple(self.input_ids.tolist()),
            sampling=SamplingParams(
                max_tokens=s.max_tokens,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                seed=s.seed,
                stop_words=s.stop_words,
                min_length=s.min_length,
            ),
            lease=self.claim,
            save=s.save,
            cache_salt=s.cache_salt,
            request_id=self.request_id,
        )

    def _note(self, event: GenerateEvent) -> None:
        if event.timings is not None:
            self.report["engine"] = event.timings.to_dict()
        if event.ticket is not None:
            self.ticket = event.ticket

    def _response(self, event: GenerateEvent, is_last: bool) -> Any:
        first = len(self.output_ids) == len(event.new_token_ids)
        ids = event.new_token_ids if self.sampling.stream else self.output_ids
        text = event.text_delta if self.sampling.stream else self.text
        if self.sampling.echo and (first or not self.sampling.stream):
            text = self.sampling.echo + text
        report = json.dumps(self.report) if first or is_last else ""
        pb_utils = self.pb_utils
        return pb_utils.InferenceResponse(
            output_tensors=[
                text_tensor(wire.TEXT_OUTPUT, text, pb_utils),
                ids_tensor(wire.OUTPUT_IDS, ids, pb_utils),
                text_tensor(wire.FINISH_REASON, event.finish_reason, pb_utils),
                text_tensor(wire.KV_REPORT, report, pb_utils),
            ]
        )


class SaveQueue:
    """Hands finished requests' KV to `kv_save`, at most `max_pending` at a time.

    Saving never delays a request: it starts after the last response, and one too many is dropped
    and counted.
    """

    def __init__(self, config: Config, engine: Engine, pb_utils: Any) -> None:
        self._max_pending = config.save.max_pending
        self._engine = engine
        self._pb_utils = pb_utils
        self._metrics = Metrics(pb_utils)
        self._pending = 0

    async def save(self, generation: Generation) -> None:
        """Save what `generation` computed; failures are logged and counted, never raised."""
        ticket = generation.ticket
        if ticket is None:
            return
        if self._pending >= self._max_pending:
            self._metrics.add("kvfetcher_saves_dropped_total")
            self._engine.release(ticket.lease_id)
            return
        self._pending += 1
        self._metrics.add("kvfetcher_saves_pending", 1)
        try:
            await self._call(generation, ticket)
        finally:
            self._pending -= 1
            self._metrics.add("kvfetcher_saves_pending", -1)

    async def _call(self, generation: Generation, ticket: SaveTicket) -> None:
        pb_utils = self._pb_utils
        tokens = np.concatenate([generation.input_ids, np.int32(generation.output_ids)])
        response = await pb_utils.InferenceRequest(
            model_name=wire.KV_SAVE,
            requested_output_names=[wire.KV_REPORT],
            inputs=[
                ids_tensor(wire.INPUT_IDS, tokens.astype(np.int32), pb_utils),
                text_tensor(wire.KV_LEASE, ticket.to_json(), pb_utils),
            ],
        ).async_exec()
        if response.has_error():
            _log.warning("kv_save: %s", response.error().message())
            self._metrics.add("kvfetcher_save_errors_total")
            return
        text = pb_utils.get_output_tensor_by_name(response, wire.KV_REPORT).as_numpy()
        report = json.loads(text.reshape(-1)[0])
        self._metrics.add("kvfetcher_saved_chunks_total", report["chunks_saved"])
        self._metrics.add("kvfetcher_saved_bytes_total", report["bytes_saved"])
        if report["error"]:
            self._metrics.add("kvfetcher_save_errors_total")

    def close(self) -> None:
        """Drop the series."""
        self._metrics.close()


async def _until_cancelled(
    events: AsyncIterator[GenerateEvent], is_cancelled: Callable[[], bool]
) -> AsyncIterator[GenerateEvent]:
    """The events, while the client is there; polled, because Triton has no callback for it."""
    iterator = aiter(events)
    while True:
        upcoming = asyncio.ensure_future(anext(iterator))
        while not upcoming.done():
            await asyncio.wait({upcoming}, timeout=_CANCEL_POLL_SECONDS)
            if not upcoming.done() and is_cancelled():
                upcoming.cancel()
                await asyncio.wait({upcoming})
                raise RequestCancelledError("the request was cancelled by its client")
        try:
            event = upcoming.result()
        except StopAsyncIteration:
            return
        yield event
