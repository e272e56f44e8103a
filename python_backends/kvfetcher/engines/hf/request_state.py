"""One request inside the torch engine: its state, and the pipe its events leave through."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING

from kvfetcher.engines.base import GenerateEvent, GenerateTimings
from kvfetcher.engines.sampling import Sampler
from kvfetcher.engines.text_stream import AnswerText

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvfetcher.engines.admission import StopRules
    from kvfetcher.engines.base import FinishReason, GenerateRequest
    from kvfetcher.engines.detokenize import Decodes
    from kvfetcher.engines.hf.kv_cache import SequenceCache
    from kvfetcher.memory.leases import Lease

_log = logging.getLogger(__name__)


class EventPipe:
    """Carries events from the engine's thread into one consumer's event loop.

    Bounded by the request itself: at most max_tokens events and a few more.
    """

    def __init__(self, is_cancelled: Callable[[], bool] | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[GenerateEvent | BaseException | None] = asyncio.Queue()
        self._is_cancelled = is_cancelled
        self._gone = threading.Event()

    async def get(self) -> GenerateEvent | None:
        """The next event; None = the end. Raises what the engine put."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def leave(self) -> None:
        """The consumer reads no more."""
        self._gone.set()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    @property
    def cancelled(self) -> bool:
        if self.gone or self._is_cancelled is None:
            return self.gone
        try:
            return self._is_cancelled()
        except Exception:  # noqa: BLE001  the server's function: its failure must not end the loop
            _log.exception("asking whether a request was cancelled failed; it counts as cancelled")
            return True

    def put(self, item: GenerateEvent | BaseException | None) -> bool:
        """Hand over from any thread; False when nobody listens any more."""
        if self.gone:
            return False
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the consumer's event loop was closed
            self.leave()
            return False
        return True


class Sequence:
    """State of one request. After submission it belongs to the engine's thread alone."""

    def __init__(
        self,
        request: GenerateRequest,
        pipe: EventPipe,
        *,
        tokenizer: Decodes,
        rules: StopRules,
        max_tokens: int,
        lease: Lease | None,
        lease_error: str,
    ) -> None:
        self.request = request
        self.pipe = pipe
        self.lease = lease
        """Claimed; released as soon as it is copied."""
        self.lease_error = lease_error
        self.max_tokens = max_tokens
        self.ids = list(request.input_ids)
        """Prompt, then what was generated."""
        self.prompt_tokens = len(self.ids)
        self.cached_tokens = 0
        self.cache: SequenceCache | None = None
        self.finish_reason: FinishReason = ""
        self._sampler = Sampler(request.sampling, rules.ids)
        self._tokenizer = tokenizer
        self._text = AnswerText(
            tokenizer,
            prompt=request.input_ids,
            eos_ids=rules.ids,
            stop_words=rules.words,
            max_tokens=max_tokens,
        )
        self._first_event_sent = False
        self._submitted = time.perf_counter()
        self._began = self._submitted
        self._loaded = self._submitted
        self._first_token = 0.0
        self._compute_seconds = 0.0

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def mark_began(self) -> None:
        self._began = self._loaded = time.perf_counter()

    def mark_loaded(self) -> None:
        self._loaded = time.perf_counter()

    def add_compute(self, seconds: float) -> None:
        """Time of one prefill slice of this request."""
        self._compute_seconds += seconds

    def accept(self, logits: torch.Tensor) -> None:
        """Choose a token from logits [vocab], send it, and notice where generation ends."""
        token = self._sampler.choose(logits, self.num_generated)
        if self.num_generated == 0:
            self._first_token = time.perf_counter()
        self.ids.append(token)
        text, reason = self._text.add(token)
        if reason:
            self._end(reason, (token,), text)
        else:
            self._send((token,), text)

    def cancel(self) -> None:
        """End with what there is."""
        self._end("cancelled", (), "")

    def _end(self, reason: FinishReason, new_ids: tuple[int, ...], text: str) -> None:
        self.finish_reason = reason
        self._send(new_ids, text)

    def _send(self, new_ids: tuple[int, ...], text: str) -> None:
        first = not self._first_event_sent
        if first and not self.request.sampling.exclude_input_in_output:
            prompt = self._tokenizer.decode(list(self.request.input_ids), skip_special_tokens=True)
            new_ids, text = self.request.input_ids + new_ids, prompt + text
        self._first_event_sent = True
        timings = self._timings() if first or self.finish_reason else None
        self.pipe.put(GenerateEvent(new_ids, text, self.finish_reason, timings))

    def _timings(self) -> GenerateTimings:
        now = time.perf_counter()
        held = self.cache.length if self.cache is not None else 0
        computed = max(0, min(held, self.prompt_tokens) - self.cached_tokens)
        return GenerateTimings(
            queue_ms=1e3 * (self._began - self._submitted),
            load_ms=1e3 * (self._loaded - self._began),
            prefill_ms=1e3 * ((self._first_token or now) - self._loaded),
            computed_tokens=computed,
            cached_tokens=self.cached_tokens,
            prefill_rate=computed / self._compute_seconds if self._compute_seconds else 0.0,
            generated_tokens=self.num_generated,
            total_ms=1e3 * (now - self._submitted),
            lease_error=self.lease_error,
        )
