"""The paged executor as a source of tokens: one thread runs its loop, requests come from event loops."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

from kvfetcher.engines.paged.executor import NewRequest, Sink
from kvfetcher.engines.sampling import Sampler
from kvfetcher.engines.tokens import PRIOR_TOKENS_PER_SECOND, TokenStep
from kvfetcher.errors import EngineError, KVFetcherError, RequestError
from kvfetcher.prefill_rate import PrefillEstimator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import torch

    from kvfetcher.engines.base import SamplingParams
    from kvfetcher.engines.paged.executor import EndReason, PagedExecutor, PagedRequest
    from kvfetcher.prefill_rate import PrefillModel

_log = logging.getLogger(__name__)

# While only copies are under way the loop turns without a batch; no need to turn faster.
_IDLE_TURN_SECONDS = 0.001


class PagedRun:
    """One request; see `tokens.TokenRun`."""

    def __init__(
        self,
        request_id: int,
        sampler: Sampler,
        *,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        abort: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self._sampler = sampler
        self._left = max_tokens
        self._num_generated = 0
        self._eos_ids = frozenset(eos_ids)
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self.metrics: dict[str, dict[str, float]] = {}
        self._queue: asyncio.Queue[TokenStep | EngineError] = asyncio.Queue()
        self._submitted = time.perf_counter()
        self._began = 0.0

    @property
    def queue_seconds(self) -> float:
        return max(0.0, self._began - self._submitted) if self._began else 0.0

    async def steps(self) -> AsyncIterator[TokenStep]:
        while True:
            item = await self._queue.get()
            if isinstance(item, EngineError):
                raise item
            yield item
            if item.finish_reason:
                return

    def abort(self) -> None:
        self._abort(self.request_id)

    # The executor's thread

    def begin(self) -> None:
        """It was scheduled for the first time."""
        self._began = self._began or time.perf_counter()

    def choose(self, logits: torch.Tensor) -> tuple[int, EndReason | None]:
        """The next token, and whether it is the last."""
        token = self._sampler.choose(logits, self._num_generated)
        self._num_generated += 1
        self._left -= 1
        reason: EndReason | None = None
        if token in self._eos_ids:
            reason = "stop"
        elif self._left <= 0:
            reason = "length"
        else:
            self.put(TokenStep((token,), ""))
        if reason is not None:
            self.put(TokenStep((token,), reason))
        return token, reason

    def put(self, item: TokenStep | EngineError) -> None:
        """Hand over; lost where the consumer's loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            _log.info("request %d: its consumer is gone", self.request_id)


class PagedSource(Sink):
    """See the module's text; methods as in `tokens.TokenSource`.

    Args:
        make: builds the executor around this sink; called in the loop's thread.

    Raises:
        KVFetcherError: the executor cannot be made.
    """

    def __init__(self, make: Callable[[Sink], PagedExecutor]) -> None:
        self._changed = threading.Condition()
        self._runs: dict[int, PagedRun] = {}
        self._ids = itertools.count(1)
        self._closing = False
        self._dead = ""
        self._estimator = PrefillEstimator(prior_tokens_per_second=PRIOR_TOKENS_PER_SECOND)
        self._prefill = self._estimator.model()
        self._executor = make(self)
        self._thread = threading.Thread(target=self._run, name="kvfetcher-paged", daemon=True)
        self._thread.start()

    @property
    def prefill(self) -> PrefillModel:
        return self._prefill

    def note_first_token(self, start: int, num_tokens: int, seconds: float) -> None:
        """Nothing: every part of a prompt is measured (`measured`)."""

    def start(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        cache_salt: str,
    ) -> PagedRun:
        if not self._executor.fits(len(prompt), max_tokens):
            raise RequestError(
                f"a prompt of {len(prompt)} tokens with max_tokens {max_tokens} needs more KV blocks"
                " than the engine has; shorten it or raise connector.pool_bytes"
            )
        with self._changed:
            if self._dead or self._closing:
                raise EngineError(self._dead or "the engine is closed")
            run = PagedRun(
                next(self._ids),
                Sampler(sampling, eos_ids),
                max_tokens=max_tokens,
                eos_ids=eos_ids,
                abort=self._abort,
            )
            self._runs[run.request_id] = run
            self._executor.submit(NewRequest(run.request_id, prompt, max_tokens, cache_salt))
            self._changed.notify()
        return run

    def fail(self, reason: str) -> None:
        """End the engine, from any thread: what it was promised will not come."""
        with self._changed:
            self._dead = self._dead or reason
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _abort(self, request_id: int) -> None:
        with self._changed:
            if request_id in self._runs:
                self._executor.cancel(request_id)
                self._changed.notify()

    # The executor's thread

    def choose(self, request: PagedRequest, logits: torch.Tensor) -> tuple[int, EndReason | None]:
        if self._dead:  # no token may come of KV that is not there
            raise EngineError(self._dead)
        run = self._runs[request.request_id]
        run.begin()
        return run.choose(logits)

    def over(self, request: PagedRequest, reason: EndReason) -> None:
        with self._changed:
            run = self._runs.pop(request.request_id)
        if reason == "cancelled":
            run.put(TokenStep((), "cancelled"))

    def measured(self, start: int, num_tokens: int, seconds: float) -> None:
        self._estimator.observe(start, num_tokens, seconds)
        self._prefill = self._estimator.model()

    def _run(self) -> None:
        import torch

        reason = "the engine was closed"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._executor.step()
            reason = self._dead or reason
        except KVFetcherError as exc:
            reason = f"the engine's loop died: {exc}; restart the server"
            _log.exception("engine loop died")
        except BaseException as exc:  # noqa: BLE001  whatever it was, nobody may be left waiting
            reason = f"the engine's loop died: {exc!r}; restart the server"
            _log.exception("engine loop died")
        finally:
            with self._changed:
                self._dead = reason
                runs = list(self._runs.values())
                self._runs.clear()
            for run in runs:
                run.put(EngineError(reason))

    def _wait_for_work(self) -> bool:
        executor = self._executor
        with self._changed:
            while not (self._closing or self._dead or executor.has_input or not executor.is_idle):
                self._changed.wait()
            if executor.is_copying and not (self._closing or self._dead or executor.has_input):
                self._changed.wait(_IDLE_TURN_SECONDS)
            return not (self._closing or self._dead)
